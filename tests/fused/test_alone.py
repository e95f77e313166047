"""vae_kernels in another project: the README's lines, run on a copy of the package with nothing else on the path."""

import os
import re
import shutil
import subprocess
import sys

from support import ROOT

SETTING = """
import torch
torch.manual_seed(0)
seed, step = 7, 3
mu_BD, logvar_BD = (torch.randn(2, 4, requires_grad=True) for _ in range(2))
x_NH, weight_VH = torch.randn(5, 3, requires_grad=True), torch.randn(11, 3, requires_grad=True)
target_N, offsets_B1 = torch.tensor([1, 2, 3, 10, 0]), torch.tensor([0, 2, 5])
sample_id_B, weight_B = torch.tensor([40, 41]), torch.tensor([0.5, 2.0])
"""

CHECK = """
import sys
assert not {"vae_dist", "deepspeed", "ray"} & set(sys.modules)
nll_N = torch.nn.functional.cross_entropy(x_NH.double() @ weight_VH.double().T, target_N, reduction="none")
wanted = (weight_B.repeat_interleave(offsets_B1.diff()) * nll_N).sum()
kl_B = 0.5 * (logvar_BD.exp() + mu_BD.square() - 1 - logvar_BD).sum(-1)
wanted = torch.autograd.grad(wanted + (weight_B * kl_B).sum(), (x_NH, weight_VH, mu_BD, logvar_BD))
for leaf, gradient in zip((x_NH, weight_VH, mu_BD, logvar_BD), wanted):
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)
print("five lines suffice")
"""


def test_the_readme_s_lines_suffice(tmp_path):
    shutil.copytree(ROOT / "kernels" / "vae_kernels", tmp_path / "vae_kernels")
    lines = re.search(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert lines is not None
    (tmp_path / "train.py").write_text(SETTING + lines[1] + CHECK, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-P", str(tmp_path / "train.py")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "five lines suffice\n", done.stderr
