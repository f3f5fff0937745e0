"""Sites of a forward: each launch counted once, with its bytes, and what inductor made beside what it calls."""

import json
import types

import bench_dit
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
    path = tmp_path / "sites.json"
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
