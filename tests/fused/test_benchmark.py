"""The benchmark of the kernels: its gate, its report, its adapters to other packages, and the model beside it."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vae_kernels
from vae_kernels import reference as plain

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
# Last, so that its modules shadow nothing.
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import correctness  # noqa: E402
import gaussian_benchmark  # noqa: E402
import gpu_peers  # noqa: E402
import loss_benchmark  # noqa: E402
import memory  # noqa: E402
import model  # noqa: E402
import problem  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
import training_step  # noqa: E402

SMALL = problem.Shape(70, 16, 130)
QUICK = ["--device", "cpu", "--shapes", "70,16,130", "--repeats", "3", "--no-memory"]
RIGHT_LOSS, RIGHT_SAMPLE = vae_kernels.linear_cross_entropy, vae_kernels.gaussian_rsample_kl


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """The compiled contenders stay plain: compiling them takes longer than all tests."""
    for module in (contenders, gaussian_benchmark, training_step):
        monkeypatch.setattr(module, "compiled", lambda form: form)
    # Nor is what others compiled in this process thrown away.
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


def last_line(text):
    return json.loads(text.strip().splitlines()[-1])


@pytest.mark.long
def test_report_of_a_run(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--json", "--device", "cpu", "--shapes", "70,16,130"]
    command += ["--repeats", "3", "--only", "eager_fp32", "eager_bf16", "ours_fp32", "--tasks", "mean"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out.json")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out.json").read_text())
    machine = result["machine"]
    assert machine["torch"] == torch.__version__ and machine["threads"] >= 1 and machine["cpu"]
    assert {machine["amx"], machine["avx512_bf16"]} <= {True, False}
    (entry,) = result["linear_cross_entropy"]
    assert (entry["device"], entry["N"], entry["H"], entry["V"], entry["task"]) == ("cpu", *SMALL, "mean")
    times = entry["milliseconds"]
    assert set(times) == {"eager_fp32", "eager_bf16", "ours_fp32"} and min(times.values()) > 0
    assert entry["best_ours"] == "ours_fp32" and entry["best_peer"] == min(
        ("eager_fp32", "eager_bf16"), key=times.__getitem__
    )
    assert entry["ratio_eager_fp32"] == pytest.approx(times["eager_fp32"] / times["ours_fp32"], rel=1e-3)
    assert entry["ratio_best_peer"] == pytest.approx(times[entry["best_peer"]] / times["ours_fp32"], rel=1e-3)
    extra = entry["extra_memory_bytes"]
    assert set(extra) == set(times)
    assert entry["extra_memory_ratio"] in (None, pytest.approx(extra["ours_fp32"] / extra["eager_fp32"], rel=1e-3))
    for name in times:
        for data in problem.DATA:
            assert {"nll", "dx", "dw"} <= set(entry["error_vs_fp64"][name][data])
    assert "eager_bf16" in done.stderr and "extra MiB" in done.stderr


def test_every_contender_is_in_every_task_it_is_for(capsys):
    assert run.main(QUICK) == 0
    result = last_line(capsys.readouterr().out)
    by_task = {entry["task"]: entry for entry in result["linear_cross_entropy"]}
    assert list(by_task) == list(contenders.TASKS)
    for contender in contenders.contenders("cpu"):
        for task in contender.tasks:
            assert contender.name in by_task[task]["milliseconds"], (contender.name, by_task[task]["could_not_run"])


def test_what_cannot_run_is_named_with_its_reason(monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(F, "linear_cross_entropy", refuse)
    name = "torch_linear_cross_entropy_bf16"
    assert run.main([*QUICK, "--tasks", "mean", "--only", name, "ours_fp32"]) == 0
    (entry,) = last_line(capsys.readouterr().out)["linear_cross_entropy"]
    assert entry["could_not_run"] == {name: "RuntimeError: no such luck"}
    assert set(entry["milliseconds"]) == {"ours_fp32"} and entry["ratio_best_peer"] is None


def with_wrong_loss(x, weight, target, **options):
    return RIGHT_LOSS(1.01 * x, weight, target, **options)


def with_wrong_weight_gradient(x, weight, target, **options):
    return RIGHT_LOSS(x, weight + 0.02 * (weight - weight.detach()), target, **options)


def with_one_row_forgotten(x, weight, target, **options):
    x = torch.cat([x[:-1], x[-1:].detach()])
    return RIGHT_LOSS(x, weight, target, **options)


def with_a_nan(x, weight, target, **options):
    return RIGHT_LOSS(torch.cat([x[:-1], x[-1:] * float("nan")]), weight, target, **options)


def with_upstream_of_one(x, weight, target, **options):
    """What gave silently wrong gradients elsewhere: every row weighted alike."""
    if "cu_seqlens" in options:
        return RIGHT_LOSS(x, weight, target, **options)
    nll = RIGHT_LOSS(x, weight, target, **options)
    return nll.detach() + (nll.sum() - nll.sum().detach()) / len(target)


def raising(*_, **__):
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (with_wrong_loss, "error of nll"),
        (with_wrong_weight_gradient, "error of dw"),
        (with_one_row_forgotten, "error of dx"),
        (with_a_nan, "nan"),
        (with_upstream_of_one, "per_token: error of dw"),
        (raising, "not today"),
    ],
)
def test_a_wrong_kernel_gets_no_speed(monkeypatch, capsys, wrong, named):
    monkeypatch.setattr(vae_kernels, "linear_cross_entropy", wrong)
    assert run.main([*QUICK, "--only", "ours_fp32", "ours_bf16", "--tasks", "mean", "per_token"]) == 1
    captured = capsys.readouterr()
    assert "a kernel is wrong" in captured.err and named in captured.err
    assert set(last_line(captured.out)) == {"wrong"} and "milliseconds" not in captured.out + captured.err
    assert all(name in captured.err for name in ("ours_fp32", "ours_bf16"))


def test_a_wrong_sample_gets_no_speed(monkeypatch):
    def wrong(mu, logvar, *arguments):
        return RIGHT_SAMPLE(mu, logvar + 0.02, *arguments)

    monkeypatch.setattr(vae_kernels, "gaussian_rsample_kl", wrong)
    with pytest.raises(correctness.WrongKernelError, match="kl"):
        gaussian_benchmark.measure("cpu", 1)
    with pytest.raises(correctness.WrongKernelError, match="loss differs"):
        training_step.measure("cpu", 1, training_step.Sizes(2, 5, 16, 1, 2, 4, 50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2"], "not three positive integers"),
        (["--shapes", "0,2,3"], "not three positive integers"),
        (["--only", "ours_fp64"], "there are eager_fp32"),
        (["--repeats", "0"], "at least one turn"),
        (["--out", "/no/such/folder/out.json"], "does not exist"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no GPU")]),
    ],
)
def test_wrong_input(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("data", problem.DATA)
def test_float64_reference(monkeypatch, data):
    shape = problem.Shape(70, 256, 130)
    monkeypatch.setitem(correctness._CHUNK_BYTES, "cpu", 8 * shape.V * 9)
    inputs = problem.make_inputs(shape, "cpu", data).to(torch.float64)
    found = correctness.reference(inputs, contenders.TASKS)
    nll_N = plain.linear_cross_entropy(inputs.x, inputs.weight, inputs.target)
    torch.testing.assert_close(found.nll, nll_N.detach())
    for task, upstream_N in (("mean", torch.full((shape.N,), 1 / shape.N)), ("per_token", inputs.upstream)):
        leaves = (inputs.x, inputs.weight)
        dx, dw = torch.autograd.grad(nll_N, leaves, upstream_N.double(), retain_graph=True)
        torch.testing.assert_close(upstream_N.double()[:, None] * found.dx, dx, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(found.dw[task], dw, rtol=1e-6, atol=1e-8)
    p_N = (-nll_N).exp()
    assert (p_N.median() > 0.9 and p_N.min() > 0.1) if data == "confident" else p_N.median() < 3 / shape.V
    half = inputs.to(torch.bfloat16)
    assert torch.equal(half.x.double(), inputs.x) and torch.equal(half.weight.double(), inputs.weight)


def test_memory_of_eager_is_its_logits():
    """At the peak of backward there are the log-probabilities, their gradient and the logits'."""
    shape = problem.Shape(512, 64, 10000)
    logits, results = 4 * shape.N * shape.V, 4 * shape.H * (shape.N + shape.V)
    assert memory.host_extra_bytes("eager_fp32", shape, "mean") == pytest.approx(3 * logits - results, rel=0.2)


def test_ratio():
    assert report.ratio({"a": 3.0, "b": 2.0}, "a", "b") == 1.5
    assert report.ratio({"a": 3.0, "b": 0}, "a", "b") is None
    assert report.ratio({"a": 3.0}, "a", "b") is None and report.ratio({"a": 3.0}, None, "a") is None


def test_parts_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setitem(training_step.SIZES, "cpu", training_step.Sizes(3, 6, 16, 1, 2, 4, 60))
    arguments = ["--device", "cpu", "--repeats", "2", "--parts", "gaussian_rsample_kl", "training_step"]
    assert run.main(arguments) == 0
    result = last_line(capsys.readouterr().out)
    (gaussian,), (step,) = result["gaussian_rsample_kl"], result["training_step"]
    for direction in ("forward", "backward"):
        times = gaussian[f"{direction}_milliseconds"]
        assert set(times) == {"eager", "compile", "ours"}
        assert gaussian[f"{direction}_ratio_eager"] == pytest.approx(times["eager"] / times["ours"], rel=1e-3)
    assert gaussian["error_vs_fp64"]["kl"] < 1e-6
    times = step["milliseconds"]
    assert step["ratio_without_kernels"] == pytest.approx(times["without_kernels"] / times["with_kernels"], rel=1e-3)
    assert step["ratio_best_peer"] == pytest.approx(times[step["best_peer"]] / times["with_kernels"], rel=1e-3)
    assert step["difference"]["gradient"] < 1e-4


def test_decoder_sees_only_what_is_before():
    sizes = training_step.Sizes(2, 6, 16, 1, 2, 4, 60)
    torch.manual_seed(0)
    vae, tokens = training_step.TextVAE(sizes), torch.randint(0, 60, (2, 6))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 60
    before, after = (vae.decode(t, torch.ones(2, 4)).view(2, 6, 16) for t in (tokens, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def other_packages():
    """Stand-ins with the argument names of liger-kernel 0.8.5, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5."""

    def liger(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
              label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
              use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
              chunk_mem_const=1):  # fmt: skip
        return contenders.eager_wide(input, weight, target, reduction)

    class LigerScaled(torch.autograd.Function):
        @staticmethod
        def apply(_input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1,
                  return_entropy=False, selected_token_ids=None):  # fmt: skip
            return contenders.eager_wide(_input, weight, target, "none")

    def cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high",
            impl=None):  # fmt: skip
        return contenders.eager_wide(e, c, targets, reduction)

    def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True,
              use_scaled_exp=None):  # fmt: skip
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Invalid reduction: {reduction}")
        return contenders.eager_wide(x, weight, target, reduction)

    return {
        "liger_kernel.transformers.functional": {"liger_fused_linear_cross_entropy": liger},
        "liger_kernel.ops": {"LigerFusedLinearScaledCrossEntropyFunction": LigerScaled},
        "cut_cross_entropy": {"linear_cross_entropy": cut},
        "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": quack},
    }


def test_adapters_of_gpu_contenders(monkeypatch):
    for path, names in other_packages().items():
        parent = path.partition(".")[0]
        for name, content in ((parent, {}), (path, names)):
            module = types.ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
    single = problem.make_inputs(SMALL, "cpu", "normal")
    wanted = correctness.reference(single, contenders.TASKS)
    refused = []
    for contender in contenders.contenders("cuda"):
        inputs = single.to(contender.dtype)
        for task in contender.tasks:
            loss = contender.make()
            try:
                found = correctness.errors(contender, loss, inputs, task, wanted)
            except ValueError as error:
                refused.append((contender.name, task, str(error)))
                continue
            assert max(found.values()) < 0.06, (contender.name, task, found)
    assert refused == [("quack", "per_token", "Invalid reduction: none")]


def test_turns_of_the_gpu_start_without_gradients(monkeypatch):
    """The rotation of inputs that contenders share, by the CPU's clock: a gradient left over would be added to."""
    shared = [problem.make_inputs(SMALL, "cpu", "normal", seed) for seed in (0, 1)]
    monkeypatch.setattr(loss_benchmark, "ColdCache", lambda: lambda: None)
    monkeypatch.setattr(loss_benchmark, "_copies", lambda *_: shared)
    monkeypatch.setattr(loss_benchmark, "device_turn", timing.host_turn)
    chosen = [each for each in contenders.contenders("cpu") if each.name in ("eager_fp32", "ours_fp32")]
    entered = {each.name: loss_benchmark.Entrant(each, each.make()) for each in chosen}
    turns = loss_benchmark._turns(entered, shared[0], "mean", "cuda")
    assert set(turns) == {"", "hot"} and all(set(of_kind) == set(entered) for of_kind in turns.values())
    wanted = []
    for inputs in shared:
        contenders.step(entered["eager_fp32"].loss, inputs, "mean")
        wanted.append(inputs.weight.grad)
        inputs.weight.grad = inputs.weight.grad.clone()
    for kind, which in (("", 0), ("", 1), ("", 0), ("hot", 0), ("hot", 0)):
        for turn in turns[kind].values():
            assert turn() > 0
            torch.testing.assert_close(shared[which].weight.grad, wanted[which])


def test_gpu_contenders_that_are_not_installed_say_so(monkeypatch):
    for name in ("liger_kernel", "cut_cross_entropy", "quack"):
        monkeypatch.setitem(sys.modules, name, None)
    peers = gpu_peers.gpu_peers()
    assert len(peers) == 6 and {peer.name for peer in peers} <= {each.name for each in contenders.contenders("cuda")}
    for contender in peers:
        with pytest.raises(ModuleNotFoundError):
            contender.make()


def test_model_by_hand():
    """N 8192, H 768, V 50304 on an H100: 3 products of 632.97 GFLOP at 700 TFLOP/s, passes over 412 M logits."""
    costs = model.loss_costs(8192, 768, 50304)
    times = {name: model.milliseconds(cost, "H100") for name, cost in costs.items()}
    product, logits = 2 * 8192 * 768 * 50304, 8192 * 50304
    assert times["exp_store"] == pytest.approx(1e3 * 3 * product / 7e14) == pytest.approx(2.7127, rel=1e-4)
    assert times["two_pass_chunked"] == pytest.approx(2.7127 + 1e3 * 6 * logits / 3.015e12, rel=1e-4)
    assert times["one_read_chunked"] == pytest.approx(2.7127 + 1e3 * 4 * logits / 3.015e12, rel=1e-4)
    assert times["recompute"] == pytest.approx(2.7127 * 4 / 3, rel=1e-4)
    assert costs["exp_store"].extra == costs["exp_store_bounded"].extra == 2 * logits
    # ceil(V / H) = 66 parts of 8192 rows are 125 rows, hence chunks of 128.
    assert costs["two_pass_chunked"].extra == 2 * 128 * 50304
    # 2^31 bytes hold 4194 rows of 256000; the logits of the other 3998 are formed twice.
    bounded = model.loss_costs(8192, 2304, 256000)["exp_store_bounded"]
    assert bounded.flop == 6 * 8192 * 2304 * 256000 + 2 * 3998 * 2304 * 256000
    # 512 sequences of 64 dimensions: mu, logvar and z of 64 KiB each, and 4 (4 B + D) bytes of float32 results.
    assert model.gaussian_costs(512, 64, 1)["forward"].bytes == 3 * 65536 + 4 * (4 * 512 + 64)


def test_model_says_what_it_is():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "model.py")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MODEL, NOT MEASURED")
    result = last_line(done.stdout)
    assert result["label"] == "MODEL, NOT MEASURED" and result["assumed"]["gemm_flop_per_second"] == 7e14
    assert len(result["linear_cross_entropy"]) == 2 * len(model.SHAPES)
    for entry in result["linear_cross_entropy"] + result["gaussian_rsample_kl"]:
        rate = result["assumed"]["bandwidth_fraction"] * result["assumed"]["bytes_per_second"][entry["gpu"]]
        for name, time in entry["milliseconds"].items():
            assert time == pytest.approx(1e3 * (entry["flop"][name] / 7e14 + entry["bytes"][name] / rate), rel=1e-4)
