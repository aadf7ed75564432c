"""`mole bench build` for real, on a shape small enough for a test."""

from benches import bench
from result_rows import result_rows
from typer.testing import CliRunner

from lookup_experts import cli
from lookup_experts.errors import UserError
from lookup_experts.table.opening import open_table

run = CliRunner().invoke


def test_build_leaves_a_table_that_opens(tmp_path):
    plot = tmp_path / "build.png"
    (result,) = bench(tmp_path, "build", "--plot", plot)["results"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert result["seconds"] > 0 and result["ratio_to_matmul"] > 0
    assert result_rows("build", [result])[0]["encoding"] == "bfloat16"
    assert open_table(tmp_path / "work" / "tiny-4e-bfloat16-built").layout.shape.num_layers == 3
    again = run(cli.app, ["bench", "build", "--shape", "tiny", "--work", str(tmp_path / "work")])
    assert isinstance(again.exception, UserError)
