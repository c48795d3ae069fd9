# SPDX-License-Identifier: Apache-2.0
"""What accelerators have, as data. Numbers are of one JAX device: a chip, or half of one that shows itself as two.

Peaks, HBM bandwidths, ICI and DCN bandwidths: the makers' pages (cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x},
nvidia.com data sheets), dense bfloat16. Usable HBM of TPUs: what libtpu 0.0.42 itself says is available when a program
does not fit. A link's one-way bandwidth is 0.9 of the documented one (bidirectional a chip / links / 2), which long
transfers reach (jax-ml.github.io/scaling-book/tpus). Clocks follow from peak = matrix units · width² · 2 · clock
(v5p: 8 units of 128², v6e: 4 of 256²).
"""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Attention:
    """Share of the peak that the attention kernel's products reach, in the forward and the backward pass.

    The compiler has no estimate for a custom kernel, so these are assumptions, a little below what its bundles say. In
    libtpu 0.0.42's code (blocks of 512, heads of 128) a visited pair of blocks takes on v5p about 1,450 bundles in the
    forward pass, where the products alone take 1,024 cycles: 0.70; in the backward passes about 0.80. On v6e, whose
    units of 256 x 256 a head of 128 half fills, 938 where products take 256: 0.27, and 2,406 where they take 896: 0.37.
    Waits for memory, and 100 to 300 bundles to go from one pair of blocks to the next, come on top. On GPUs they were
    measured: JAX's Triton kernel on an H100, forward and backward, heads of 64, rows of 2,048 and 4,096, reached 0.13
    and 0.15, blocks of other segments counted, which it does not skip.
    """

    forward: float = 0.6
    backward: float = 0.65
    skips_segments: bool = True


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device."""

    name: str
    platform: str
    """JAX's name: `tpu`, `gpu` or `cpu`."""
    hbm: float
    """Bytes that a program may use."""
    peak: float
    """Dense bfloat16 FLOP/s; 0: not known."""
    hbm_bandwidth: float
    """Bytes a second."""
    clock: float = 0.0
    """Cycles a second of the compiler's estimates."""
    torus: int = 0
    """Dimensions of the slice's torus; 0: no torus but nodes."""
    link: float = 0.0
    """Bytes a second that one link carries one way: ICI of a torus, or what a GPU has inside its node."""
    dcn: float = 0.0
    """Bytes a second a device sends to other slices or nodes."""
    per_chip: int = 1
    """Devices of one chip."""
    node: int = 1
    """Devices of one host or GPU node."""
    largest: int = 0
    """Chips of the largest slice."""
    attention: Attention = Attention()
    product_share: float = 0.75
    """Share of the peak that large matrix products reach, for arithmetic: 0.7 to 0.87 by the compiler's cycles on v5p;
    on v6e what a compiled step of `llama8b` left for them;
    on GPUs what a whole step of Llama 3.2 1B's shape left for them (H200, docs/performance.md)."""
    options: tuple[tuple[str, str], ...] = ()
    """What the topology description of the compiler needs besides the shape."""

    @property
    def chip_hours_per_device(self) -> float:
        """Of a device-hour."""
        return 1.0 / self.per_chip


_LINK = 0.9e9 / 2  # bidirectional GB/s to usable one-way bytes/s


def _gpu(name: str, hbm: float, peak: float, hbm_bandwidth: float, link: float, dcn: float) -> Chip:
    return Chip(
        name, "gpu", hbm, peak, hbm_bandwidth, link=link, dcn=dcn, node=8,
        attention=Attention(0.14, 0.14, skips_segments=False), product_share=0.57,
    )  # fmt: skip


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "tpu", 30.75 * GIB, 275e12, 1228e9, 1.05e9, torus=3, link=600 / 6 * _LINK, dcn=50e9 / 8,
            node=4, largest=4096, options=(("chip_config_name", "megacore"),),
        ),
        Chip(
            "v5e", "tpu", 15.75 * GIB, 197e12, 819e9, 1.5e9, torus=2, link=400 / 4 * _LINK, dcn=25e9 / 8,
            node=4, largest=256,
        ),
        Chip(
            "v5p", "tpu", 95.74 * GIB, 459e12, 2765e9, 1.75e9, torus=3, link=1200 / 6 * _LINK, dcn=50e9 / 8,
            node=4, largest=8960,
        ),
        Chip(
            "v6e", "tpu", 31.25 * GIB, 918e12, 1638e9, 1.75e9, torus=2, link=800 / 4 * _LINK, dcn=100e9 / 8,
            node=4, largest=256, attention=Attention(0.235, 0.31), product_share=0.64,
        ),
        Chip(
            "tpu7x", "tpu", 94.75 * GIB, 2307e12 / 2, 7380e9 / 2, 2.2e9, torus=3, link=1200 / 6 * _LINK,
            dcn=100e9 / 8 / 2, per_chip=2, node=8, largest=9216, attention=Attention(0.2, 0.27),
        ),
        _gpu("a100", 76 * GIB, 312e12, 2039e9, link=300e9, dcn=25e9),
        _gpu("h100", 76 * GIB, 989e12, 3350e9, link=450e9, dcn=50e9),
        _gpu("h200", 134 * GIB, 989e12, 4800e9, link=450e9, dcn=50e9),
        _gpu("b200", 171 * GIB, 2250e12, 8000e9, link=900e9, dcn=50e9),
        Chip("cpu", "cpu", 0.0, 0.0, 0.0, node=1 << 20),
    )
}  # fmt: skip
