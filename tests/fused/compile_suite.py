"""Every Triton kernel with its shipped configuration, compiled for sm_80, sm_90 and sm_100; no GPU is needed.

`test_triton.py` runs this file in a process of its own without TRITON_INTERPRET, which would turn the kernels
into plain Python.
"""

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vae_kernels import gaussian_rsample_kl_triton as gaussian
from vae_kernels import linear_cross_entropy_triton as lce

ARCHITECTURES = [80, 90, 100]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_kernel(kernel, arch, types, constants, num_warps, num_stages=3):
    """The compiled kernel; pointers and the integers of `types` marked "i32*" are multiples of 16."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if "*" in kind]
    signature = {name: kind.rstrip("*") for name, kind in signature.items()}
    constants = {name: value for name, value in constants.items() if signature.get(name) == "constexpr"}
    assert set(constants) == {name for name, kind in signature.items() if kind == "constexpr"}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(compiled, arch, tmp_path):
    """It fits, and keeps nothing on the stack: neither a spill nor an indexed array."""
    assert compiled.metadata.shared <= SHARED_BYTES[arch]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack is not None, usage
    assert int(stack[1]) == 0, usage


LCE_SHAPE = {"N": "i32", "V": "i32", "H": "i32*"}
LCE_FORWARD = {
    "target": "*i64",
    "peak": "*fp32",
    "total": "*fp32",
    "target_logit": "*fp32",
    "logit_sum": "*fp32",
    **LCE_SHAPE,
    "tiles_per_split": "i32",
}
LCE_DELTA = {"target": "*i64", "lse": "*fp32", "grad": "*fp32", **LCE_SHAPE, "start": "i32*", "width": "i32*"}
LCE_PLAIN = {"SCALE": 1.0, "CAP": 0.0, "SMOOTHING": 0.0, "Z_LOSS": 0.0, "HAS_BIAS": True, "WIDEN": False}
LCE_FULL = LCE_PLAIN | {"SCALE": 1.5, "CAP": 30.0, "SMOOTHING": 0.1, "Z_LOSS": 1e-4}


LCE_CASES = [(arch, dtype, LCE_FULL) for arch in ARCHITECTURES for dtype in ("bf16", "fp32")]


# The product's element type and the options change little between architectures; each is tried once.
@pytest.mark.parametrize("arch, dtype, options", [*LCE_CASES, (90, "fp16", LCE_FULL), (90, "bf16", LCE_PLAIN)])
def test_linear_cross_entropy(arch, dtype, options, tmp_path):
    config = lce.SINGLE_CONFIG if dtype == "fp32" else lce.HALF_CONFIG
    tensors = {"x": f"*{dtype}", "weight": f"*{dtype}", "bias": f"*{dtype}"}
    launch = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    forward = compile_kernel(lce.lce_forward_kernel, arch, LCE_FORWARD | tensors, options | config, **launch)
    check(forward, arch, tmp_path)
    tensors["delta"] = f"*{dtype}"
    delta = compile_kernel(lce.lce_delta_kernel, arch, LCE_DELTA | tensors, options | config, **launch)
    check(delta, arch, tmp_path)
    if dtype != "fp32":
        product = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[arch]
        assert product in forward.asm["ptx"] and product in delta.asm["ptx"]


GAUSSIAN = {
    **dict.fromkeys(("z", "kl", "kl_free", "kl_partial", "log_q", "log_p", "free_bits"), "*fp32"),
    **dict.fromkeys(("grad_z", "grad_kl", "grad_kl_free", "grad_log_q", "grad_log_p"), "*fp32"),
    **dict.fromkeys(("out_mu", "out_logvar", "out_prior_mu", "out_prior_logvar"), "*fp32"),
    **dict.fromkeys(("prior_mu_stride", "prior_logvar_stride", "B", "D", "K"), "i32"),
    "rng": "*i64",
    "sample_id": "*i64",
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, dim, prior", [("fp32", 32, False), ("bf16", 64, True), ("fp32", 1, False)])
def test_gaussian_rsample_kl(arch, dtype, dim, prior, tmp_path):
    rows, pairs = gaussian.block_shape(dim)
    constants = {"STREAM": 3, "HAS_PRIOR_MU": prior, "HAS_PRIOR_LOGVAR": prior, "R": rows, "P": pairs}
    flags = [
        "HAS_GRAD_Z",
        "HAS_GRAD_KL",
        "HAS_GRAD_KL_FREE",
        "HAS_GRAD_LOG_Q",
        "HAS_GRAD_LOG_P",
        "NEED_PRIOR",
    ]
    typed = dict.fromkeys(("mu", "logvar", "prior_mu", "prior_logvar", "z", "grad_z"), f"*{dtype}")
    for kernel, extra in itertools.product(
        [gaussian.gaussian_forward_kernel, gaussian.gaussian_backward_kernel], [dict.fromkeys(flags, True)]
    ):
        used = {name: kind for name, kind in (GAUSSIAN | typed).items() if name in kernel.arg_names}
        known = {name: value for name, value in (constants | extra).items() if name in kernel.arg_names}
        check(compile_kernel(kernel, arch, used, known, gaussian.NUM_WARPS), arch, tmp_path)
