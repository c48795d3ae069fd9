# SPDX-License-Identifier: Apache-2.0
"""TPU programs read back: what their text says a step takes."""

import pytest

from llm_jepa_jax.plan import hlo, work
from llm_jepa_jax.plan.links import Links
from llm_jepa_jax.plan.schedule import Walk
from llm_jepa_jax.plan.topology import parse_topology

TPU_TEXT = """HloModule jit_f, is_scheduled=true

%fused (param_0.1: bf16[8,16], param_1.1: bf16[32,8,16]) -> bf16[8,16] {
  %param_0.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[32,8,16]{2,1,0} parameter(1)
  %constant.3 = s32[] constant(0)
  %dynamic-slice.1 = bf16[1,8,16]{2,1,0} dynamic-slice(%param_1.1, %constant.3), dynamic_slice_sizes={1,8,16}
  %bitcast.1 = bf16[8,16]{1,0} bitcast(%dynamic-slice.1)
  ROOT %add.1 = bf16[8,16]{1,0} add(%param_0.1, %bitcast.1)
}

%body (loop: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%loop), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
  %gather-start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %work = bf16[8,16]{1,0} negate(%x), backend_config={"window_config":{"estimated_cycles":"1750000"}}
  %gather-done = bf16[32,16]{1,0} all-gather-done(%gather-start)
  ROOT %next = (s32[], bf16[8,16]{1,0}) tuple(%i, %work)
}

%condition (state: (s32[], bf16[8,16])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

ENTRY %main (p0: bf16[8,16], p1: bf16[32,8,16]) -> bf16[8,16] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[32,8,16]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%zero, %p0)
  %loop.1 = (s32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body, frontend_attributes={note={
"a": "spelled over lines"
}}, metadata={op_name="jit(f)/while"}
  %y = bf16[8,16]{1,0} get-tuple-element(%loop.1), index=1
  ROOT %sum = bf16[8,16]{1,0} fusion(%y, %p1), calls=%fused, backend_config={"window_config":{"estimated_cycles":"175"}}
}
"""


def test_cycles_of_loops_and_hidden_exchanges_add_up():
    """A TPU program: three turns of a millisecond each, in which a gather hides."""
    module, topology = hlo.parse(TPU_TEXT), parse_topology("v5p:2x2x1")
    links = Links(topology, {"fsdp": 4}, [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0)])
    timeline = Walk(module, topology.chip, links, 4, 0, lambda loop: None).run()
    assert timeline.compute == pytest.approx(3e-3 + 1e-7)
    assert timeline.exposed == 0 and timeline.hidden > 0
    ((axes, name, kind), traffic) = next(iter(timeline.traffic.items()))
    assert (axes, kind, traffic.count, traffic.num_bytes) == (("fsdp",), "all-gather", 3, 3 * 32 * 16 * 2)
    assert name == "ICI row of 2 x row of 2"
    entry = module.computations["main"]
    assert work.hbm_bytes(module, entry, entry.by_name["sum"]) == 3 * 8 * 16 * 2  # a slice of the stack, not the stack


def test_an_exchange_that_fusions_drive_is_one_and_hides_behind_them_alone():
    """Started, carried on by a product and by a shorter one, and awaited: four times in the text, once on the links."""
    gather = "all-gather(%{0}), channel_id=7, replica_groups=[1,4]<=[4], dimensions={{0}}"
    stages = ("Start", "", "", "Done")
    inside, calls = [], []
    for number, stage in enumerate(stages):
        end = (
            f'custom-call(%g{number}), custom_call_target="AsyncCollective{stage}"' if stage else f"negate(%g{number})"
        )
        inside.append(
            f"%stage{number} (q{number}: bf16[8192,4096]) -> bf16[32768,4096] {{\n"
            f"  %q{number} = bf16[8192,4096]{{1,0}} parameter(0)\n"
            f"  %g{number} = bf16[32768,4096]{{1,0}} {gather.format(f'q{number}')}\n"
            f"  ROOT %end{number} = bf16[32768,4096]{{1,0}} {end}\n}}\n"
        )
        cycles = "" if stage else f', backend_config={{"estimated_cycles":"{1750 * (number + 1)}"}}'
        calls.append(f"  %f{number} = bf16[32768,4096]{{1,0}} fusion(%p0), kind=kCustom, calls=%stage{number}{cycles}")
    calls.insert(2, '  %other = bf16[8]{0} negate(%p0), backend_config={"estimated_cycles":"17500000"}')
    entry = "ENTRY %main (p0: bf16[8192,4096]) -> bf16[8192,4096] {\n  %p0 = bf16[8192,4096]{1,0} parameter(0)\n"
    module = hlo.parse("HloModule m\n\n" + "\n".join(inside) + "\n" + entry + "\n".join(calls) + "\n}\n")
    topology = parse_topology("v5p:2x2x1")
    links = Links(topology, {"fsdp": 4}, [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0)])
    timeline = Walk(module, topology.chip, links, 4, 0, lambda loop: None).run()
    ((_, _, kind), traffic) = next(iter(timeline.traffic.items()))
    assert (len(timeline.traffic), kind, traffic.count, traffic.num_bytes) == (1, "all-gather", 1, 32768 * 4096 * 2)
    assert timeline.compute == pytest.approx(10e-3 + 2e-6 + 3e-6)
    assert timeline.exposed == pytest.approx(traffic.seconds - 5e-6)


def test_what_the_sparse_cores_exchange_hides_behind_the_core():
    """A scatter that they make, started and awaited, and an array that they only copy: the latter is nobody's time."""
    text = """HloModule m

%rs (a: bf16[4096,4096], t: token[]) -> bf16[1024,4096] {
  %t = token[] parameter(1)
  %a = bf16[4096,4096]{1,0} parameter(0)
  ROOT %o = bf16[1024,4096]{1,0} reduce-scatter(%a), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%cp (b: bf16[4096,4096]) -> bf16[4096,4096] {
  %b = bf16[4096,4096]{1,0} parameter(0)
  ROOT %c = bf16[4096,4096]{0,1} copy(%b)
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[4096,4096]) -> bf16[1024,4096] {
  %p = bf16[4096,4096]{1,0} parameter(0)
  %s = ((bf16[4096,4096]{1,0}), bf16[1024,4096]{1,0}) call-start(%p), to_apply=%rs
  %k = ((bf16[4096,4096]{1,0}), bf16[4096,4096]{0,1}) call-start(%p), to_apply=%cp
  %w = bf16[4096,4096]{1,0} negate(%p), backend_config={"estimated_cycles":"1750"}
  %kd = bf16[4096,4096]{0,1} call-done(%k)
  ROOT %d = bf16[1024,4096]{1,0} call-done(%s)
}
"""
    topology = parse_topology("v6e:2x2")
    links = Links(topology, {"fsdp": 4}, [(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)])
    timeline = Walk(hlo.parse(text), topology.chip, links, 4, 0, lambda loop: None).run()
    ((_, _, kind), traffic) = next(iter(timeline.traffic.items()))
    assert (len(timeline.traffic), kind, traffic.num_bytes) == (1, "reduce-scatter", 4096 * 4096 * 2)
    assert timeline.compute == pytest.approx(1e-6)
    assert timeline.exposed == pytest.approx(traffic.seconds - 1e-6) and timeline.exposed > 0


def test_reserved_memory_is_no_work():
    """The stacks of a loop begin as memory that nobody has written; a kernel's result is written."""
    line = '  %it = bf16[32,8192,4096]{2,1,0} custom-call(), custom_call_target="AllocateBuffer", backend_config={}'
    text = TPU_TEXT.replace("  %zero = s32[] constant(0)", f"  %zero = s32[] constant(0)\n{line}")
    for found, num_bytes in ((text, 0), (text.replace("AllocateBuffer", "tpu_custom_call"), 32 * 8192 * 4096 * 2)):
        module = hlo.parse(found)
        entry = module.computations["main"]
        assert work.hbm_bytes(module, entry, entry.by_name["it"]) == num_bytes
