"""Reading: every format gives the same table, every broken file gives a `DataError` that mends it, and large logs stay within their memory."""
import csv
import gzip
import io
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecom_importance.preprocessing import reading
from ecom_importance.preprocessing.reading import aggregate_log, deduplicate, find_files, guess_encoding, open_database, read_table, scan
from ecom_importance.samples import DataError, data_root

TABLE = pd.DataFrame({
    "query": ["desk lamp", "台灯", 'say "hi", you', "two\nlines"], "item_id": ["A1", "B2", "C3", "D4"], "price": [9.9, 30.0, 1e-3, 12.0],
    "count": [1, 2, 3, 4], "sold": [True, False, True, True], "timestamp": pd.to_datetime(["2024-05-01 10:00:00", "2024-05-02", "2024-05-03 23:59:59", "1999-01-01"], format="ISO8601").astype("datetime64[us]")})


def write(table: pd.DataFrame, path: Path) -> Path:
    "Write a table in the format of the path's name."
    name, plain = path.name.removesuffix(".gz"), io.BytesIO()
    if ".parquet" in name:
        table.to_parquet(plain, index=False)
    elif ".json" in name or ".ndjson" in name:
        plain.write(table.to_json(orient="records", lines=True, force_ascii=False, date_format="iso", date_unit="us").encode())
    else:
        plain.write(table.to_csv(index=False, sep="\t" if name.endswith(".tsv") else ",").encode())
    path.write_bytes(gzip.compress(plain.getvalue()) if path.name.endswith(".gz") else plain.getvalue())
    return path


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    "Equal values; types may differ in their missing-value flavour."
    assert list(one.columns) == list(other.columns)
    pd.testing.assert_frame_equal(one, other, check_dtype=False)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet", "t.jsonl", "t.ndjson", "t.json", "t.csv.gz", "t.tsv.gz", "t.parquet.gz", "t.jsonl.gz", "T.CSV.GZ"])
def test_every_format_gives_the_same_table(tmp_path, name):
    table = TABLE if "tsv" not in name else TABLE
    path = tmp_path / name
    write(table, tmp_path / name.lower()).rename(path)
    read = read_table(path)
    same(read, table)
    assert read["count"].dtype == np.int64 and read["price"].dtype == np.float64 and read["timestamp"].dtype.kind == "M" and read["sold"].dtype.kind == "b"


def test_glob_and_list_keep_the_order_of_files_and_match_columns_by_name(tmp_path):
    write(TABLE[:2], tmp_path / "part-1.csv")
    write(TABLE.iloc[2:, ::-1], tmp_path / "part-2.csv.gz")
    for source in (str(tmp_path / "part-*"), [tmp_path / "part-1.csv", tmp_path / "part-2.csv.gz"]):
        same(read_table(source), TABLE)
    assert read_table([tmp_path / "part-2.csv.gz", tmp_path / "part-1.csv"])["item_id"].tolist() == ["C3", "D4", "A1", "B2"]
    same(read_table([tmp_path / "part-1.csv", tmp_path / "part-1.csv"]), TABLE[:2])  # a file named twice is read once


@pytest.mark.parametrize("name", ["it's [1] *.csv", "星 号?.parquet", "a b.jsonl"])
def test_names_with_quotes_and_glob_characters(tmp_path, name):
    write(TABLE, tmp_path / name)
    write(TABLE[:1], tmp_path / ("it's 1 x" + Path(name).suffix))
    same(read_table(tmp_path / name), TABLE)


def test_columns_choose_and_rename(tmp_path):
    path = write(TABLE, tmp_path / "t.csv")
    read = read_table(path, columns={"price": "eur", "query": "text"}, where="eur > 1")
    assert list(read.columns) == ["eur", "text"] and read["eur"].tolist() == [9.9, 30.0, 12.0]


def test_dotted_names_reach_into_json(tmp_path):
    path = tmp_path / "events.ndjson"
    path.write_text('{"id": "a", "event": {"position": {"ordinal": 3}}, "t": "2024-05-01T10:00:00+08:00"}\n{"id": "b", "t": "2024-05-01T10:00:00Z"}\n')
    read = read_table(path, columns={"id": "id", "event.position.ordinal": "position", "t": "timestamp"})
    assert read["position"].tolist()[0] == 3 and read["position"].isna().tolist() == [False, True]
    assert read["timestamp"].tolist() == [pd.Timestamp("2024-05-01 02:00"), pd.Timestamp("2024-05-01 10:00")]  # both in UTC
    with pytest.raises(DataError, match="no such column"):
        read_table(path, columns={"event.position.x": "position"})


def test_types_come_from_all_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("code,long,gap,day,n\n007,12345678901234567890,1,2024-05-01,1.0\n12,1,,2024-05-02,-3\n99,2,9007199254740993,2024-05-03,nan\n")
    read = read_table(path)
    assert read["code"].tolist() == ["007", "12", "99"] and read["long"].tolist()[0] == "12345678901234567890"
    assert str(read["gap"].dtype) == "Int64" and read["gap"][2] == 9007199254740993  # not through a float
    assert read["day"][2] == pd.Timestamp("2024-05-03") and read["n"].dtype == np.float64 and np.isnan(read["n"][2])


def test_stated_types(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,s,ms,b\n1,1714557600,1714557600500,true\n2,0,0,false\n")
    read = read_table(path, types={"a": "str", "s": "epoch_s", "ms": "epoch_ms", "b": "bool"})
    assert read["a"].tolist() == ["1", "2"] and read["s"][0] == pd.Timestamp("2024-05-01 10:00") and read["ms"][0] == pd.Timestamp("2024-05-01 10:00:00.5")
    with pytest.raises(DataError, match="'flaot' is not a type"):
        read_table(path, types={"a": "flaot"})
    with pytest.raises(DataError, match="did you mean 'ms'"):
        read_table(path, types={"mss": "int"})
    pd.DataFrame({"n": [1.0, 2.5]}).to_parquet(tmp_path / "n.parquet")
    with pytest.raises(DataError) as error:
        read_table(tmp_path / "n.parquet", types={"n": "int"})
    assert error.value.rows == [1] and error.value.column == "n"


BROKEN = {
    "header only": ("h.csv", b"query,price\n", {}, {"what": "a header and no rows"}),
    "only a newline": ("h.csv", b"\n", {}, {"what": "empty"}),
    "empty": ("e.csv", b"", {}, {"what": "0 bytes"}),
    "empty gz": ("e.csv.gz", gzip.compress(b""), {}, {"what": "empty"}),
    "no json lines": ("e.jsonl", b"\n\n", {}, {"what": ""}),
    "semicolons": ("s.csv", b"query;price\nlamp;1\n", {}, {"what": "one column", "mend": "delimiter=';'"}),
    "tabs in csv": ("s.csv", b"query\tprice\nlamp\t1\n", {}, {"mend": r"delimiter='\t'"}),
    "commas in tsv": ("s.tsv", b"query,price\nlamp,1\n", {}, {"mend": "delimiter=','"}),
    "two names": ("d.csv", b"query,query\n1,2\n", {}, {"what": "two columns", "column": "query"}),
    "missing column": ("m.csv", b"query,price\nlamp,1\n", {"columns": {"Qeury": "query"}}, {"column": "Qeury", "mend": "did you mean 'query'"}),
    "mapped twice": ("m.csv", b"query,price\nlamp,1\n", {"columns": {"query": "a", "price": "a"}}, {"what": "one name"}),
    "mixed": ("x.csv", b"query,price\na,1\nb,2\nc,n/a\nd,\ne,?\n", {}, {"column": "price", "rows": [2, 4], "mend": "types={'price': 'str'}"}),
    "mixed times": ("x.csv", b"q,t\na,2024-05-01\nb,2024-05-02\nc,yesterday\n", {}, {"column": "t", "rows": [2]}),
    "mixed json": ("x.jsonl", b'{"price": 1}\n{"price": "n/a"}\n{"price": 3}\n', {}, {"column": "price", "rows": [1]}),
    "stated": ("x.csv", b"query,price\na,1\nb,1.5\n", {"types": {"price": "int"}}, {"column": "price", "rows": [1], "expected": "int"}),
    "ragged": ("r.csv", b'query,price\n"a\nb",1\nb,2,3\nc\nd,4\n', {}, {"rows": [1, 2], "what": "2 fields"}),
    "latin-1": ("l.csv", "query,price\nlamp,1\ncafé noir,2\n".encode("latin-1"), {}, {"rows": [1], "column": "query", "mend": "encoding='latin-1'"}),
    "gb18030": ("g.csv", "query,price\n台灯,1\nlamp,2\n床头柜，实木,3\n".encode("gb18030"), {}, {"rows": [0, 2], "column": "query", "mend": "encoding='gb18030'"}),
    "gb18030 gz": ("g.csv.gz", gzip.compress("query,price\n台灯,1\n".encode("gb18030")), {}, {"rows": [0], "mend": "encoding='gb18030'"}),
    "gb18030 header": ("g.csv", "查询,价格\nlamp,1\n".encode("gb18030"), {}, {"mend": "encoding='gb18030'"}),
    "gb18030 json": ("g.jsonl", '{"query": "lamp"}\n{"query": "台灯"}\n'.encode("gb18030"), {}, {"rows": [1], "mend": "encoding='gb18030'"}),
    "utf-16": ("u.csv", "query,price\nlamp,1\n".encode("utf-16"), {}, {"mend": "encoding='utf-16'"}),
    "not gb18030": ("g.csv", b"query,price\nlamp,1\n\xff\xff,2\n", {"encoding": "gb18030"}, {"rows": [1], "what": "not gb18030"}),
    "unknown encoding": ("g.csv", b"query,price\nlamp,1\n", {"encoding": "gb1803"}, {"what": "'gb1803' is not an encoding"}),
    "array": ("a.json", b' [{"query": "lamp"}]', {}, {"what": "JSON array"}),
    "broken json": ("b.jsonl", b'{"query": "lamp"}\n{"query": \n{"query": "x"}\n', {}, {"rows": [1]}),
    "json numbers": ("b.jsonl", b'{"query": "lamp"}\n3\n', {}, {"rows": [1]}),
    "cut gz": ("c.csv.gz", gzip.compress(b"query,price\nlamp,1\n" * 5000)[:-20], {}, {"what": "damaged"}),
    "false gz": ("c.csv.gz", b"query,price\nlamp,1\n", {}, {"what": "damaged"}),
    "cut parquet gz": ("c.parquet.gz", gzip.compress(b"PAR1" * 5000)[:-20], {}, {"what": "damaged"}),
    "not parquet": ("n.parquet", b"query,price\nlamp,1\n", {}, {"what": "parquet"}),
    "ending": ("n.xlsx", b"query,price\nlamp,1\n", {}, {"what": "ending", "expected": ".csv"}),
    "format": ("n.csv", b"query,price\nlamp,1\n", {"format": "excel"}, {"what": "'excel' is not a format"}),
    "where": ("w.csv", b"query,price\nlamp,1\n", {"where": "prize > 1"}, {"what": "prize > 1"}),
    "open quote": ("q.csv", b'query,price\n"lamp,1\nsofa,2\n', {}, {"what": ""}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_a_reason(tmp_path, case):
    name, content, how, wanted = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(path, **how)
    error = caught.value
    for key, value in wanted.items():
        found = getattr(error, key)
        assert found == value if key in ("rows", "column") else value in (found or ""), f"{key}: {error}"
    assert error.__cause__ is None and not isinstance(error.__context__, DataError) or case  # what the reader sees is the message alone
    if case not in ("mapped twice", "unknown encoding", "format", "where"):
        assert Path(str(error.file)) == path, str(error)
        assert name in str(error)
    assert "ecom_importance-" not in str(error)  # no temporary file is named


@pytest.mark.parametrize("case, encoding", [("latin-1", "latin-1"), ("gb18030", "gb18030"), ("gb18030 gz", "GB18030"), ("gb18030 json", "gb18030"), ("utf-16", "utf-16"), ("gb18030 header", "gb18030")])
def test_the_encoding_that_the_error_names_reads_the_file(tmp_path, case, encoding):
    name, content, *_ = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    read = read_table(tmp_path / name, encoding=encoding)
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode(encoding)
    for value in read.iloc[:, 0]:
        assert value in text and "\ufffd" not in value
    assert len(read) == len(text.strip().splitlines()) - (not name.endswith("jsonl"))


def test_missing_files_suggest_the_nearest(tmp_path):
    write(TABLE, tmp_path / "clicks.csv")
    with pytest.raises(DataError, match="did you mean clicks.csv"):
        find_files(tmp_path / "click.csv")
    for source, what in ((tmp_path, "a folder"), (tmp_path / "*.tsv", "no such file"), (tmp_path / "no" / "x.csv", "no such file"), ([], "empty list")):
        with pytest.raises(DataError, match=what):
            find_files(source)


def test_parts_that_differ_are_refused_with_their_name(tmp_path):
    write(TABLE, tmp_path / "1.csv")
    write(TABLE.drop(columns="price"), tmp_path / "2.csv")
    with pytest.raises(DataError, match=r"lacking \['price'\]") as caught:
        read_table(tmp_path / "*.csv")
    assert Path(caught.value.file).name == "2.csv"
    write(TABLE, tmp_path / "3.parquet")
    with pytest.raises(DataError, match="several formats"):
        read_table(tmp_path / "*")


def test_bad_rows_are_found_in_the_right_part_and_at_the_right_row(tmp_path):
    good = pd.DataFrame({"query": [f"query {at}" for at in range(200_000)], "price": np.arange(200_000) / 7})
    good.to_csv(tmp_path / "1.csv", index=False)
    bad = good.astype({"price": object})
    bad.loc[[150_003, 199_999], "price"] = "free"
    bad.to_csv(tmp_path / "2.csv", index=False)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "*.csv")
    assert Path(caught.value.file).name == "2.csv" and caught.value.rows == [150_003, 199_999] and "free" in str(caught.value)


def test_ids_and_texts_may_mix(tmp_path):
    (tmp_path / "t.csv").write_text("product,search\n42,lamp\n43,12\nB00X,100\n44,200\n")
    with pytest.raises(DataError, match="mixed types"):
        read_table(tmp_path / "t.csv")
    read = read_table(tmp_path / "t.csv", columns={"product": "item_id", "search": "query"})
    assert read["item_id"].tolist() == ["42", "43", "B00X", "44"] and read["query"].tolist() == ["lamp", "12", "100", "200"]


def test_an_item_that_turns_up_late_decides_the_type(tmp_path):
    rows = ["item_id,query"] + [f"{at},q" for at in range(10_000)] + ["B00X,q"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    assert read_table(tmp_path / "t.csv")["item_id"].iloc[[0, -1]].tolist() == ["0", "B00X"]


def test_long_titles_emoji_bom_and_windows_lines(tmp_path):
    long = "灯👨‍👩‍👧" * 10_000
    (tmp_path / "t.csv").write_bytes(f"\ufeffquery,item_text\r\nlamp,{long}\r\n\r\nsofa,\r\n".encode())
    read = read_table(tmp_path / "t.csv")
    assert list(read.columns) == ["query", "item_text"] and read["item_text"][0] == long and pd.isna(read["item_text"][1]) and len(read) == 2


texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8))
def test_what_python_writes_as_csv_is_read_back(tmp_path, rows):
    with open(tmp_path / "t.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b", "c"), *rows])
    read = read_table(tmp_path / "t.csv", types=dict.fromkeys("abc", "str"))
    assert [tuple("" if pd.isna(value) else value for value in row) for row in read.itertuples(index=False)] == rows


@given(st.text(st.characters(codec="gb2312", min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=1, max_size=30))
def test_chinese_bytes_are_guessed_chinese(text):
    data = text.encode("gb18030")
    assert guess_encoding(data) == "gb18030"


def test_scan_is_lazy_and_cleans_up(tmp_path):
    write(TABLE, tmp_path / "t.csv")
    (tmp_path / "g.csv").write_bytes(BROKEN["gb18030"][1])
    with open_database("200MB", folder=tmp_path) as connection:
        relation = scan(tmp_path / "g.csv", encoding="gb18030", connection=connection)
        assert isinstance(relation, duckdb.DuckDBPyRelation) and relation.filter("price > 1").fetchall() == [("lamp", 2), ("床头柜，实木", 3)]
        assert any(path.is_dir() for path in tmp_path.iterdir())
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    assert len(scan(tmp_path / "t.csv").fetchall()) == 4  # without a connection


def test_scan_without_a_connection_leaves_no_folder_behind(tmp_path):
    (tmp_path / "g.csv").write_bytes(BROKEN["gb18030"][1])
    code = "from ecom_importance.preprocessing.reading import scan; print(len(scan('g.csv', encoding='gb18030').fetchall()))"
    (tmp_path / "spill").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PATH": "", "TMPDIR": str(tmp_path / "spill")}, capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr
    assert not list((tmp_path / "spill").iterdir())


events = st.lists(st.tuples(st.sampled_from(["lamp", "台灯", None]), st.integers(1, 3), st.sampled_from(["view", "click", "cart", "purchase"]), st.integers(1, 2), st.integers(0, 5)), min_size=1, max_size=40)


def as_log(rows) -> pd.DataFrame:
    log = pd.DataFrame(rows, columns=["query", "item_id", "behaviour", "user_id", "hour"])
    return log.assign(query=log["query"].astype("str"), timestamp=pd.Timestamp("2024-05-01") + pd.to_timedelta(log["hour"], unit="h"), position=log["item_id"] * 2)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=events)
def test_deduplicate_equals_pandas(tmp_path, rows):
    log = as_log(rows)
    log.to_parquet(tmp_path / "log.parquet")
    summary = deduplicate(tmp_path / "log.parquet", tmp_path / "once.parquet")
    once = pd.read_parquet(tmp_path / "once.parquet")
    assert summary.rows_read == len(log) == once["copies"].sum() and summary.rows_written == len(log.drop_duplicates()) == len(once)
    assert set(map(str, once.drop(columns="copies").to_dict("records"))) == set(map(str, log.drop_duplicates().to_dict("records")))
    deduplicate(tmp_path / "log.parquet", tmp_path / "first.parquet", by=["user_id", "item_id"], keep_first="timestamp")
    first = pd.read_parquet(tmp_path / "first.parquet")
    pd.testing.assert_series_equal(first.set_index(["user_id", "item_id"])["timestamp"], log.groupby(["user_id", "item_id"])["timestamp"].min(), check_dtype=False)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=events)
def test_aggregate_log_equals_pandas(tmp_path, rows):
    log = as_log(rows)
    log.to_parquet(tmp_path / "log.parquet")
    until = pd.Timestamp("2024-05-01 04:00")
    summary = aggregate_log(tmp_path / "log.parquet", tmp_path / "pairs.parquet", user="user_id", timestamp="timestamp", position="position", until=until)
    pairs = pd.read_parquet(tmp_path / "pairs.parquet")
    used = log[log["query"].notna() & (log["timestamp"] < until)]
    assert summary.rows_read == len(log) and summary.rows_used == len(used) and summary.rows_written == len(pairs)
    keys = used.groupby(["query", "item_id"])
    expected = pd.DataFrame({f"n_{name}": keys["behaviour"].agg(lambda values, name=name: int((values == name).sum())) for name in reading.BEHAVIOURS})
    expected = expected.assign(users=keys["user_id"].nunique(), mean_position=keys["position"].mean(), first_time=keys["timestamp"].min(), last_time=keys["timestamp"].max())
    assert [tuple(row) for row in pairs.itertuples(index=False)] == [tuple(row) for row in expected.reset_index().itertuples(index=False)]


def test_aggregate_log_maps_words_and_refuses_unknown_ones(tmp_path):
    log = as_log([("lamp", 1, "view", 1, 0), ("lamp", 1, "click", 1, 1), ("lamp", 1, "view", 2, 1)]).replace({"view": "pv", "click": "fav"})
    log.to_csv(tmp_path / "log.csv", index=False)
    aggregate_log(tmp_path / "log.csv", tmp_path / "pairs.parquet", behaviours={"pv": "view", "fav": "cart", "buy": "purchase"})
    assert pd.read_parquet(tmp_path / "pairs.parquet").iloc[0].to_dict() == {"query": "lamp", "item_id": 1, "n_view": 2, "n_cart": 1, "n_purchase": 0}
    before = (tmp_path / "pairs.parquet").read_bytes()
    for how, what in (({"behaviours": ("pv",)}, "'fav'"), ({"behaviour": "behavior"}, "did you mean 'behaviour'"), ({"until": "2024-01-01"}, "timestamp=")):
        with pytest.raises(DataError, match=what):
            aggregate_log(tmp_path / "log.csv", tmp_path / "pairs.parquet", **how)
    assert (tmp_path / "pairs.parquet").read_bytes() == before  # a failure leaves what was there
    with pytest.raises(DataError, match="keep_first"):
        deduplicate(tmp_path / "log.csv", tmp_path / "once.parquet", by=["query"])
    with pytest.raises(DataError, match="copies"):
        deduplicate(tmp_path / "log.csv", tmp_path / "once.parquet", copies="query")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "pairs.parquet"]


WORK = """
import json, sys
from ecom_importance.preprocessing.reading import aggregate_log, deduplicate
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
start = peak()
once = deduplicate("log.csv", "once.parquet", memory_limit="200MB", threads=2)
pairs = aggregate_log("once.parquet", "pairs.parquet", user="user_id", timestamp="timestamp", memory_limit="200MB", threads=2)
print(json.dumps([once.rows_read, once.rows_written, pairs.rows_written, start, peak()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which only Linux has")
def test_a_log_far_larger_than_the_limit(tmp_path):
    import json

    rows = 2_000_000
    with open_database("500MB") as connection:
        connection.execute(f"""COPY (
            SELECT '台灯 ' || (hash(i) % 200000)::VARCHAR || ' 实木床头柜带台灯 with a drawer' AS query, 'item ' || (hash(i + 1) % 50000)::VARCHAR AS item_id, hash(i + 2) % 1000 AS user_id,
                   ['view', 'click', 'cart', 'purchase'][1 + (hash(i + 3) % 4)::INT] AS behaviour, TIMESTAMP '2024-01-01' + to_seconds(i::BIGINT * 3) AS timestamp
            FROM (SELECT CASE WHEN r % 10 = 9 THEN r - 5 ELSE r END AS i FROM range({rows}) t(r))) TO '{tmp_path}/log.csv' (HEADER)""")
    done = subprocess.run([sys.executable, "-c", WORK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, once, pairs, start, peak = json.loads(done.stdout)
    log = pd.read_csv(tmp_path / "log.csv")
    assert read == rows and once == 0.9 * rows
    assert pairs == len(log[["query", "item_id"]].drop_duplicates())
    found = pd.read_parquet(tmp_path / "pairs.parquet", columns=["n_view", "n_click", "n_cart", "n_purchase"]).sum()
    expected = log.drop_duplicates()["behaviour"].value_counts()
    assert found.rename(lambda name: name[2:]).to_dict() == expected.to_dict()
    size = log.memory_usage(deep=True).sum() / 2**20  # what the log takes as a table, before any work on it
    assert peak - start < 300 and size > 220, f"{peak - start:.0f} MB above the imports' {start:.0f} MB, for a log of {size:.0f} MB"


def test_a_limit_that_is_too_small_says_so_and_leaves_nothing(tmp_path):
    with open_database("500MB") as connection:
        connection.execute(f"COPY (SELECT i AS a, hash(i)::VARCHAR AS b FROM range(500000) t(i)) TO '{tmp_path}/log.parquet'")
    with pytest.raises(DataError, match="memory"):
        deduplicate(tmp_path / "log.parquet", tmp_path / "once.parquet", memory_limit="3MB", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]
    with pytest.raises(DataError, match="not a memory limit"):
        deduplicate(tmp_path / "log.parquet", tmp_path / "once.parquet", memory_limit="plenty")


@pytest.mark.skipif(data_root() is None, reason="the data folder is not here")
def test_real_files():
    data = data_root()
    judged = read_table(data / "home_depot_train.csv.gz", columns={"search_term": "query", "product_uid": "item_id", "product_title": "item_text", "relevance": "label"})
    assert judged.shape == (74_067, 4) and judged["query"].nunique() == 11_795 and judged["label"].between(1, 3).all()
    reviews = read_table(data / "online_shopping_10_cats.csv.gz")
    assert len(reviews) == 62_774 and set(reviews["label"]) == {0, 1} and reviews["cat"].nunique() == 10
    assert len(read_table(data / "online_retail.parquet", columns={"Quantity": "quantity"}, where="quantity < 0")) == 10_624
