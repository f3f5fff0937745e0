"""Sites of a forward, each launch counted once, and its floor: products and attention alone, on the weights."""

import json
import types

import bench_dit
import dit_floor
import dit_sites
import torch
from torch._inductor.codecache import PyCodeCache

DEVICE = torch.device("cpu")
X = torch.ones(4, 8)


def test_every_launch_is_in_a_row():
    def forward():
        return (X @ X.t()).relu_() + X.t()[:4, :4].contiguous().sin()

    rows = dit_sites.site_rows({"eager": forward}, "compiled", DEVICE, 2)
    found = {row["site"].rpartition(" ")[2]: (row["launches"], row["bytes"]) for row in rows}
    assert found == {"product": (1, 0), "relu_": (1, 128), "clone": (1, 128), "sin": (1, 128), "add": (1, 192)}
    assert all(row["us"] > 0 and row["provider"] == "eager" for row in rows)
    assert [row["us"] for row in rows] == sorted((row["us"] for row in rows), reverse=True)
    lines = dit_sites.table(rows).splitlines()
    assert lines[1].split()[:3] == ["eager", "5", "576"]


def test_kernels_of_inductor_are_rows_and_stay_as_they_were(monkeypatch):
    class Triton:
        def run(self, x, *, stream):
            x.add_(stream)

    module = types.ModuleType("generated")
    module.cpp_fused_add_0, module.triton_poi_1 = (lambda x, y: y.copy_(x)), Triton()
    before = dict(vars(module))
    monkeypatch.setattr(PyCodeCache, "modules", [module])

    def forward():
        module.cpp_fused_add_0(X, torch.empty_like(X))
        module.triton_poi_1.run(torch.zeros(2), stream=1)
        return X + 1

    rows = dit_sites.site_rows({"compiled": forward}, "compiled", DEVICE, 1)
    found = {row["site"]: (row["launches"], row["bytes"]) for row in rows}
    assert found["inductor cpp_fused_add_0"] == (1, 256)
    assert found["inductor triton_poi_1"] == (1, 8)
    assert any(site.endswith(" add") for site in found)
    assert dict(vars(module)) == before


def test_the_table_of_a_small_forward(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "sites.json"
    monkeypatch.setattr(bench_dit, "LEAST_OF", 1)
    monkeypatch.setattr(bench_dit, "compiler_missing", lambda device: "no compiler here")
    options = ["--default-allocator", "--rounds", "1", "--output-json", str(path)]
    assert bench_dit.main(["--sites", "--cases", "small", *options]) == 0
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert {row["provider"] for row in rows} == {"ltxkern", bench_dit.EAGER, bench_dit.ONE_TIMESTEP}
    launches = {
        name: sum(r["launches"] for r in rows if r["provider"] == name) for name in ("ltxkern", bench_dit.EAGER)
    }
    assert launches["ltxkern"] < 0.5 * launches[bench_dit.EAGER]
    assert written["machine"]["device"] == "cpu"
    assert "site" in capsys.readouterr().out


def test_the_floor_is_the_products_and_attention_on_the_weights():
    weight, bias, other = torch.ones(8, 8), torch.ones(8), torch.ones(1, 2, 4, 4)

    def forward():
        y = torch.addmm(bias, X.sin(), weight) @ weight[:, :4]
        return torch.nn.functional.scaled_dot_product_attention(other, other, other), y

    with dit_floor.ContractionLog([weight, bias]) as log:
        forward()
    assert log.flops == 2 * 4 * 8 * 8 + 2 * 4 * 8 * 4 + 4 * other.numel() * 4
    kept, activation, matrix = log.calls[0][1]
    assert (kept.data_ptr(), matrix.data_ptr()) == (bias.data_ptr(), weight.data_ptr())
    assert activation == dit_floor.Layout((4, 8), (8, 1), torch.float32)
    run = dit_floor.floor_calls(log, DEVICE)
    with dit_floor.ContractionLog([weight, bias]) as again:
        run()
    assert len(log.calls) == 3
    for (func, args, _), (func2, args2, _) in zip(log.calls, again.calls, strict=True):
        assert func is func2
        for one, two in zip(args, args2, strict=True):
            assert one == two if not isinstance(one, torch.Tensor) else one.data_ptr() == two.data_ptr()
