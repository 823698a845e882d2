from __future__ import annotations

import json
import subprocess
import sys

import pytest

import bayesae as bae
from bayesae import report


@pytest.fixture
def records():
    records = report.Records()
    for seed, value in ((0, 1.0), (1, 3.0)):
        records.add(data="d", setting="s", method="A", metric="error", seed=seed, value=value)
        records.add(data="d", setting="s", method="A", metric="time", seed=seed, value=100 * value)
    records.add(data="d", setting="s", method="B", metric="error", seed=0, value=5.0)
    return records


def test_table_has_mean_and_spread(records):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.table(records).splitlines()]
    assert lines[0] == ["method", "error", "time"]
    assert lines[2] == ["A", "2.000 ± 1.414", "200.0 ± 141.4"]
    assert lines[3] == ["B", "5.000", ""]


def test_table_pivots_and_filters(records):
    lines = report.table(records, metrics=["error"], columns="method").splitlines()
    assert [c.strip() for c in lines[0].strip("|").split("|")] == ["A", "B"]
    with pytest.raises(bae.errors.DataError, match="names of"):
        report.table(records, methods=["C"])
    records.add(data="other", setting="s", method="A", metric="error", seed=0, value=9.0)
    assert report.table(records, metrics=["error"], data=["d"], columns="method") == "\n".join(lines)
    with pytest.raises(bae.errors.DataError, match="'nowhere'"):
        report.table(records, data=["nowhere"])
    assert "1.000" in report.table(records, metrics=["error"], data=["d"], seeds=[0], columns="method")


def test_save_and_load_are_inverse(records, tmp_path):
    records.save(tmp_path / "deep" / "r.json")
    assert report.Records.load(tmp_path / "deep" / "r.json").rows == records.rows
    assert records.mean(method="A", metric="error") == 2.0
    with pytest.raises(bae.errors.DataError, match="none with"):
        records.mean(method="C")


def test_a_file_keeps_other_records_and_renews_the_same(records, tmp_path):
    path = tmp_path / "r.json"
    records.save(path)
    newer = report.Records()
    newer.add(data="d", setting="s", method="B", metric="error", seed=0, value=7.0)
    newer.add(data="d", setting="s", method="C", metric="error", seed=0, value=8.0)
    newer.save(path, keeps_others=True)
    merged = report.Records.load(path)
    assert len(merged.rows) == len(records.rows) + 1
    assert merged.mean(method="B") == 7.0 and merged.mean(method="A", metric="error") == 2.0
    newer.save(path)
    assert report.Records.load(path).rows == newer.rows


def test_pages_are_rewritten_from_records(records, tmp_path):
    records.save(tmp_path / "r.json")
    page = tmp_path / "page.md"
    page.write_text('before\n<!-- table: r.json metrics=["error"] methods=["A"] -->\nstale\n<!-- /table -->\nafter\n')
    command = [sys.executable, "-W", "error", "-m", "bayesae.report", str(page)]
    assert "rewritten" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "2.000 ± 1.414" in page.read_text() and "stale" not in page.read_text()
    assert page.read_text().startswith("before\n<!-- table: r.json") and page.read_text().endswith("after\n")
    assert "unchanged" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_comparisons_are_tables_too(tmp_path):
    rows = [
        {"question": "q", "peer": "p", "ratio": 1234.5, "plan": None},
        {"question": "q", "peer": "none", "ratio": None, "plan": None},
    ]
    (tmp_path / "c.json").write_text(json.dumps({"environment": {}, "records": rows}))
    page = tmp_path / "page.md"
    page.write_text('<!-- table: c.json columns=["peer","ratio","plan"] having="ratio" -->\n<!-- /table -->\n')
    report.update_page(page)
    assert "| p    | 1,234 |      |" in page.read_text() and "none" not in page.read_text()
    page.write_text(page.read_text().replace('"plan"', '"plans"'))
    with pytest.raises(bae.errors.DataError, match="plans"):
        report.update_page(page)


def test_flags():
    got = report.flags("doc", seeds=(0, 1), argv=["--fast", "--json", "x.json"])
    assert got.fast and not got.full and got.seeds == (0, 1) and got.json.name == "x.json"
    assert report.flags("doc", argv=["--seeds", "4", "5"]).seeds == (4, 5)
    assert got.methods is None
    assert report.flags("doc", argv=["--methods", "a b", "c"]).methods == ("a b", "c")
    assert report.flags("doc", argv=[]).data == ()


def test_flags_of_several_data_sets():
    def data(*argv: str, has_full: bool = True) -> tuple[str, ...]:
        return report.flags("doc", has_full=has_full, data=("a", "b", "c"), argv=argv).data

    assert data() == ("a",)
    assert data("--full") == data(has_full=False) == ("a", "b", "c")
    assert data("--data", "c", "b") == ("b", "c")
    with pytest.raises(SystemExit):
        data("--data", "d")


def test_a_claim_that_does_not_reproduce_is_an_error(records, capsys):
    records.expect(2.1, 0.2, method="A", metric="error")
    assert "as expected: A, error 2.000" in capsys.readouterr().out
    with pytest.raises(bae.errors.DataError, match=r"expected 3 ± 0.5 for A, error; got 2\. The claim"):
        records.expect(3, 0.5, method="A", metric="error")
