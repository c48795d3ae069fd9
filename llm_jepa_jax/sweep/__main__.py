# SPDX-License-Identifier: Apache-2.0
"""`python -m llm_jepa_jax.sweep --dir=DIR …`: runs what is not done, then compares. See docs/sweeps.md."""

from llm_jepa_jax.sweep.sweep import main

if __name__ == "__main__":
    main()
