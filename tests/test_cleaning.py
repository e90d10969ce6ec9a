"""Cleaning: every step says how many rows it touched, touches the right ones, and nothing else."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecom_importance.preprocessing.cleaning import (
    REPAIRS, clean_log, clean_samples, clean_text, cut_texts, drop_bots, drop_duplicates, drop_impossible, drop_invisible, fill_missing, find_conflicts,
    find_impossible, flag_bots, measure_sessions, rate_threshold, repair_texts, strip_html)
from ecom_importance.preprocessing.reading import read_table
from ecom_importance.samples import DataError, data_root

NOW = pd.Timestamp("2026-01-01")
pieces = st.sampled_from(["<", ">", "&", ";", "<b>", "</b>", "<br/>", "&amp;", "&lt;", "&gt;", "&#8203;", "&nbsp;", "\u200b", "\u200d", "\u3000", "＜", "Ａ", "é", "e\u0301",
                          "👨\u200d👩\u200d👧", "lamp", "台灯", " ", "\x07", "#", "x", "<!--", "-->", "<script>", "</script>", "\ud83d", "½", "\u202e", "p"])
dirty = st.lists(pieces, max_size=14).map("".join) | st.text(max_size=20)


@settings(max_examples=400, deadline=None)
@given(dirty)
def test_clean_text_is_idempotent_and_clean(text):
    clean = clean_text(text)
    assert clean_text(clean) == clean
    clean.encode("utf-8")  # a file can hold it
    assert clean == clean.strip() and "  " not in clean and not any(character in clean for character in "\u200b\u3000\x07\ud83d\u202e\n\t")


@given(st.text(st.characters(categories=["Lu", "Ll", "Nd"], max_codepoint=0x17F) | st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=1, max_size=30))
def test_plain_words_keep_their_case(text):
    import unicodedata

    assert clean_text(text) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize("text, wanted", [
    ("TV < 40 inch > 30 inch", "TV < 40 inch > 30 inch"), ("a<b and c>d", "a<b and c>d"), ("<L> <XL> frame", "<L> <XL> frame"), ("AT&T, R&D, B & Q", "AT&T, R&D, B & Q"),
    ("<b>Desk</b>&nbsp;lamp", "Desk lamp"), ("one<br>two<p>three</p>", "one two three"), ("x<sup>2</sup>", "x2"), ("<IMG SRC='a.png' ALT=\"x > y\"/>lamp", "lamp"),
    ("&lt;b&gt;Sofa&lt;/b&gt;", "Sofa"), ("&amp;amp;", "&"), ("&#x53F0;灯", "台灯"), ("<script>alert('<b>')</script>lamp", "lamp"), ("<!-- old -->lamp", "lamp"),
    ("a <b unclosed", "a <b unclosed"), ("10% &off; now", "10% &off; now"), ("<!-- never closed", "<!-- never closed"),
    ("ＬＥＤ　１２Ｖ　台灯（白色）", "LED 12V 台灯(白色)"), ("《书》【新品】", "《书》【新品】"), ("ｱｲﾛﾝ", "アイロン"),
    ("👨‍👩‍👧 🎁 🏳️‍🌈 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "👨‍👩‍👧 🎁 🏳️‍🌈 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿"), ("la\u200dmp \u200c台\u200d灯", "lamp 台灯"), ("\ufefftitle\u00ad", "title"), ("a\x00b\x07c", "a b c"), ("", ""), ("\u200b \u3000", "")])
def test_texts(text, wanted):
    assert clean_text(text) == wanted


def test_html_of_hostile_length_is_quick_and_whole():
    assert strip_html("<" * 10_000) == "<" * 10_000
    assert clean_text("<b>灯</b>&amp;" * 5_000) == "灯&" * 5_000
    assert len(clean_text("<!--" * 3_000)) == 12_000


def test_repairs_count_rows_and_leave_the_rest():
    table = pd.DataFrame({"query": ["lamp", "ＬＥＤ", None, "lamp"], "item_text": ["a", "b", "<b>c</b>", "d"], "price": [1, 2, 3, 4]}, index=[7, 8, 9, 9])
    before = table.copy()
    clean, touched = repair_texts(table, ["query", "item_text", "absent"], clean_text)
    pd.testing.assert_frame_equal(table, before)  # the caller's table is untouched
    assert touched == 2 and clean["query"].tolist()[:2] == ["lamp", "LED"] and pd.isna(clean["query"].iloc[2]) and clean["item_text"].iloc[2] == "c"
    assert clean["price"].tolist() == [1, 2, 3, 4] and list(clean.index) == [7, 8, 9, 9] and clean.dtypes.equals(table.dtypes)
    assert repair_texts(clean, ["query", "item_text"], clean_text)[1] == 0
    category, touched = repair_texts(table.astype({"query": "category"}), ["query"], clean_text)
    assert touched == 1 and category["query"].iloc[1] == "LED"
    assert cut_texts(pd.DataFrame({"t": ["x" * 10, "x" * 11]}), ["t"], 10)[1] == 1


def test_filling_uses_training_rows_alone():
    table = pd.DataFrame({"price": [1.0, 3.0, None, 100.0, None], "split": ["train", "train", "train", "test", "test"], "brand": ["a", "a", None, "b", "b"]})
    assert fill_missing(table, "price", "median")[0]["price"].tolist() == [1, 3, 2, 100, 2]
    assert fill_missing(table, "brand", "mode")[0]["brand"].tolist() == ["a", "a", "a", "b", "b"]
    assert fill_missing(table, "brand", "none")[1:] == (1, "none")
    with pytest.raises(DataError, match="no training row"):
        fill_missing(table.assign(price=[None, None, None, 1.0, 1.0]), "price", "median")


def test_impossible_values_each_by_its_rule():
    table = pd.DataFrame({"price": pd.array([1, None, -1, 2], dtype="Int64"), "position": [0.0, np.inf, 1, np.nan], "dwell": [0, 1, 2, -0.1], "propensity": [1, 0.5, 0, 1.1],
                          "other": [np.nan, -5, -np.inf, 1], "timestamp": pd.to_datetime(["1990-01-01", "1989-12-31", "2026-01-02", None]), "quantity": [-1, -1, -1, -1]})
    wrong = find_impossible(table, now=NOW)
    assert wrong["price"].tolist() == [False, False, True, False] and wrong["position"].tolist() == [True, True, False, False]  # the first position is 1
    assert wrong["dwell"].tolist() == [False] * 3 + [True] and wrong["propensity"].tolist() == [False, False, True, True] and wrong["other"].tolist() == [False, False, True, False]
    assert wrong["timestamp"].tolist() == [False, True, True, False] and "quantity" not in wrong  # returns are negative quantities
    assert drop_impossible(table, now=NOW)[1] == 4
    zoned = table["timestamp"].dt.tz_localize("Asia/Shanghai")
    assert find_impossible(pd.DataFrame({"timestamp": zoned}), now=NOW.tz_localize("UTC"))["timestamp"].tolist() == [True, True, True, False]
    with pytest.raises(DataError) as error:
        find_impossible(pd.DataFrame({"price": ["1", "free", "2"]}))
    assert error.value.rows == [1] and error.value.column == "price"
    with pytest.raises(DataError, match="epoch_ms"):
        find_impossible(pd.DataFrame({"timestamp": [1714557600]}))


def test_duplicates_do_not_look_at_ids_or_the_ledger():
    table = pd.DataFrame({"sample_id": [1, 2, 3, 4], "query": "lamp", "item_text": "Lamp", "label": ["E", "E", "E", "I"], "split": ["train", "train", "test", "train"], "noise": ["", "flip", "", ""]})
    kept, dropped = drop_duplicates(table)
    assert dropped == 1 and kept["sample_id"].tolist() == [1, 3, 4]
    assert find_conflicts(table.drop(columns="noise"))["labels"].tolist() == ["E, I"] * 4
    assert find_conflicts(table.assign(query=None)).empty and find_conflicts(table.assign(label="E")).empty


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["lamp", "LAMP", "sofa"]), st.sampled_from(["a", "b"]), st.integers(1, 2)), min_size=1, max_size=20))
def test_conflicts_equal_brute_force(rows):
    table = pd.DataFrame(rows, columns=["query", "item_text", "label"])
    found = set(find_conflicts(table).index)
    wanted = {at for at, (query, text, label) in enumerate(rows) if any(query.lower() == other.lower() and text == title and label != said for other, title, said in rows)}
    assert found == wanted


def brute_sessions(log: pd.DataFrame, gap: float) -> list[tuple]:
    "Sessions by loops."
    rows = []
    for user, group in log.sort_values("timestamp", kind="stable").groupby("user_id"):
        times, sessions = list(group["timestamp"].drop_duplicates()), []  # one moment is one event
        for moment in times:
            if sessions and (moment - sessions[-1][-1]).total_seconds() <= gap * 60:
                sessions[-1].append(moment)
            else:
                sessions.append([moment])
        for number, session in enumerate(sessions, 1):
            peak = max(sum(0 <= (last - first).total_seconds() <= 60 for first in session) for last in session)
            rows.append((user, number, len(session), peak, session[0], session[-1]))
    return rows


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9000)), min_size=1, max_size=40))
def test_sessions_equal_brute_force(rows):
    log = pd.DataFrame(rows, columns=["user_id", "second"])
    log["timestamp"] = pd.Timestamp("2024-05-01") + pd.to_timedelta(log["second"], unit="s")
    found = measure_sessions(log, gap_minutes=10)[["user_id", "session", "events", "peak_rate", "start", "stop"]]
    assert [tuple(row) for row in found.sort_values(["user_id", "session"]).itertuples(index=False)] == brute_sessions(log, 10)
    assert found["user_id"].drop_duplicates().tolist() == log["user_id"].drop_duplicates().tolist()


def log_with_bots(n_humans: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    plans = [("human", int(rng.integers(2, 30)), 30.0) for _ in range(n_humans)] + [("burst", 120, 0.4)] * 5 + [("crawler", 500, 10.0)] * 5
    tables = []
    for user, (kind, length, pause) in enumerate(plans):
        start = pd.Timestamp("2024-05-01") + pd.Timedelta(seconds=int(rng.integers(0, 86400)))
        tables.append(pd.DataFrame({"user_id": f"u{user}", "timestamp": start + pd.to_timedelta(np.cumsum(rng.exponential(pause, length)), unit="s"), "kind": kind}))
    log = pd.concat(tables, ignore_index=True).sample(frac=1, random_state=seed)  # in no order
    return log.assign(query="lamp", item_id=rng.integers(0, 9, len(log)), label="click")


def test_bots_are_dropped_and_humans_kept():
    log = log_with_bots()
    kept, dropped = drop_bots(log)
    assert set(kept["kind"]) == {"human"} and dropped == (log["kind"] != "human").sum() == 5 * 120 + 5 * 500
    sessions = flag_bots(measure_sessions(log))
    reasons = sessions.assign(kind=sessions["user_id"].map(log.drop_duplicates("user_id").set_index("user_id")["kind"])).groupby("kind")["reason"].unique()
    assert reasons["human"].tolist() == [""] and "rate" in reasons["burst"][0] and reasons["crawler"].tolist() == ["events"]
    nameless = log.assign(user_id=log["user_id"].where(log["kind"] != "burst"))
    assert (drop_bots(nameless)[0]["kind"] == "burst").sum() == 600  # without a user there is no session to judge
    mixed = log.assign(user_id=[int(name[1:]) if name < "u2" else name for name in log["user_id"]])
    assert drop_bots(mixed)[1] == dropped
    zoned = log.assign(timestamp=log["timestamp"].dt.tz_localize("Asia/Shanghai"))
    assert drop_bots(zoned)[1] == dropped


def paged_log(seed: int = 0) -> pd.DataFrame:
    "200 shoppers who look at one page of twelve items; ten of them at nine, one every ten seconds."
    rng = np.random.default_rng(seed)
    tables = []
    for user in range(200):
        start = pd.Timestamp("2024-05-01") + pd.Timedelta(seconds=int(rng.integers(0, 86400)))
        shown = start + pd.to_timedelta(np.repeat(np.arange(9 if user < 10 else 1) * 10, 12), unit="s")
        tables.append(pd.DataFrame({"user_id": f"u{user}", "timestamp": shown, "item_id": np.arange(len(shown)), "query": "lamp", "label": "view"}))
    return pd.concat(tables, ignore_index=True)


def test_a_page_of_impressions_is_one_act(tmp_path):
    log = paged_log()
    assert drop_bots(log)[1] == 0 and clean_samples(log, now=NOW)[1]["rows touched"].iloc[-1] == 0
    sessions = measure_sessions(log).set_index("user_id")
    assert sessions.loc["u0", ["events", "peak_rate"]].tolist() == [9, 7] and sessions.loc["u10", "events"] == 1
    log.to_parquet(tmp_path / "log.parquet")
    assert clean_log(tmp_path / "log.parquet", tmp_path / "clean.parquet", now=NOW)["rows after"].iloc[-1] == len(log)


def test_only_training_rows_are_judged():
    rows = pd.DataFrame({"sample_id": range(5), "query": "lamp", "item_text": ["LED", "LED", "desk", "desk", "oak"], "label": ["E", "I", "E", "I", "S"],
                         "split": ["train", "test", "train", "train", "valid"]})
    clean, report = clean_samples(rows, conflicts="drop")
    assert clean["sample_id"].tolist() == [0, 1, 4]  # a test label takes no training row away, and its own row stays
    told = report.set_index("step").loc["contradicting labels"]
    assert told["rows touched"] == 2 and told["what was done"] == "1 group of one query and title with several labels among the training rows, dropped"
    assert clean_samples(rows.drop(columns="split"), conflicts="drop")[0]["sample_id"].tolist() == [4]
    assert len(clean_samples(rows[rows["split"] != "train"], conflicts="drop")[0]) == 2

    log = log_with_bots(100)
    robots = log["kind"] != "human"
    trusted = log.assign(split=np.where(robots, "test", "train"))
    assert len(clean_samples(trusted, now=NOW)[0]) == len(log)  # trusted rows stay, however fast
    noisy = log.assign(split=np.where(log["user_id"].isin(["u0", "u1"]), "test", "train"))
    alone = clean_samples(noisy[noisy["split"] == "train"], now=NOW)[1]["what was done"].iloc[-1]
    crawled = pd.concat([noisy, *(noisy[robots].assign(split="test", user_id=noisy["user_id"] + f"-{copy}") for copy in range(40))])
    clean, report = clean_samples(crawled, now=NOW)
    assert report["what was done"].iloc[-1] == alone  # the thresholds are those of the training rows
    assert (clean["split"] == "test").sum() == (crawled["split"] == "test").sum() and set(clean.loc[clean["split"] == "train", "kind"]) == {"human"}


def test_the_report_says_what_filled_a_gap():
    table = pd.DataFrame({"query": "lamp", "item_text": ["a", "b", "c"], "label": "E", "price": [1.0, 3.0, np.nan], "brand": ["x", "x", None]})
    told = clean_samples(table, fill={"price": "median", "brand": "mode"})[1].set_index("step")["what was done"]
    assert told["missing price"] == "filled with 2, the median of all rows: there is no split"
    assert told["missing brand"] == "filled with 'x', the mode of all rows: there is no split"
    told = clean_samples(table.assign(split="train"), fill={"price": "median", "brand": "none"})[1].set_index("step")["what was done"]
    assert told["missing price"] == "filled with 2, the median of the training rows" and told["missing brand"] == "filled with 'none'"


def test_thresholds_resist_the_bots_they_look_for():
    rng = np.random.default_rng(0)
    humans = np.maximum(1, rng.lognormal(2, 0.5, 1000))
    assert rate_threshold(humans, 1) == pytest.approx(np.exp(2 + 4 * 0.5), rel=0.15)  # the log-normal's own median and deviation
    assert rate_threshold(np.r_[humans, np.full(100, 1e6)], 1) < 2 * rate_threshold(humans, 1)
    assert rate_threshold(np.array([]), 30) == 30


SAMPLES = pd.DataFrame({
    "sample_id": range(9), "query_id": 1, "query": ["lamp"] * 9, "item_id": list("AABCDEFGH"), "item_text": ["LED", "<i>LED</i>", "LED", "desk", None, "oak", "pine", "emoji 🎁", "灯" * 10_000],
    "label": ["E", "E", "I", "S", "E", None, "S", "E", "I"], "gain": [1, 1, 0, 0.1, 1, 0, 0.1, 1, 0.0], "split": "train", "price": [1, 1, 1, -2, 1, 1, np.nan, 3, 4.0]}, index=[5] * 9)


def test_the_report_adds_up():
    before = SAMPLES.copy()
    clean, report = clean_samples(SAMPLES, fill={"price": "median"}, now=NOW)
    pd.testing.assert_frame_equal(SAMPLES, before)
    assert list(report.columns) == ["step", "rows before", "rows touched", "rows after", "what was done"]
    assert (report["rows before"].to_numpy()[1:] == report["rows after"].to_numpy()[:-1]).all() and report["rows after"].iloc[-1] == len(clean)
    told = report.set_index("step")["rows touched"].to_dict()
    assert told["text: html"] == 1 and told["missing item_text"] == 1 and told["missing label"] == 1 and told["missing price"] == 1
    assert told["impossible values"] == 1 and told["exact duplicates"] == 1 and told["contradicting labels"] == 2
    assert clean["sample_id"].tolist() == [0, 2, 6, 7, 8] and list(clean.index) == list(range(5)) and clean["price"].notna().all()
    assert clean["item_text"].iloc[-1] == "灯" * 10_000 and clean["item_text"].iloc[-2] == "emoji 🎁"
    again, second = clean_samples(clean, now=NOW)
    pd.testing.assert_frame_equal(again, clean)
    assert second.loc[~second["step"].isin(["contradicting labels"]), "rows touched"].sum() == 0
    short, report = clean_samples(SAMPLES, max_characters=512, conflicts="drop", now=NOW)
    assert short["sample_id"].tolist() == [6, 7, 8] and short["item_text"].str.len().max() == 512
    assert "512" in report.set_index("step").loc["text: length", "what was done"]


def test_bots_in_samples_and_what_cannot_be_checked():
    log = log_with_bots(100)
    clean, report = clean_samples(log, now=NOW)
    assert set(clean["kind"]) == {"human"} and report["step"].iloc[-1] == "bot-like sessions"
    assert len(clean_samples(log, bots=False, now=NOW)[0]) > len(clean)
    assert "not checked" in clean_samples(log.drop(columns="user_id"), now=NOW)[1]["what was done"].iloc[-1]


@pytest.mark.parametrize("how, what", [({"fill": {"prise": 1}}, "prise"), ({"conflicts": "ignore"}, "'keep' or 'drop'")])
def test_bad_settings(how, what):
    with pytest.raises(DataError, match=what):
        clean_samples(SAMPLES, **how)


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match="none of 9 rows is left.*missing label 8"):
        clean_samples(SAMPLES.assign(label=None))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000))
def test_clean_log_equals_clean_samples(tmp_path, seed):
    rng = np.random.default_rng(seed)
    log = log_with_bots(60, seed).drop(columns="label").reset_index(drop=True)
    log["query"] = rng.choice(["desk lamp", "<b>台灯</b>", "ＬＥＤ", "", "\u200b", "Ab\u3000C"], len(log))
    log["timestamp"] = log["timestamp"].dt.floor("us").astype("datetime64[us]").where(rng.random(len(log)) > 0.01, pd.Timestamp("1970-01-01"))
    log = pd.concat([log, log.iloc[:50]], ignore_index=True)
    log.to_csv(tmp_path / "log.csv", index=False)
    report = clean_log(tmp_path / "log.csv", tmp_path / "clean.parquet", now=NOW)
    clean, told = clean_samples(log, text=("query",), now=NOW)
    order = ["user_id", "timestamp", "item_id", "query"]
    written = pd.read_parquet(tmp_path / "clean.parquet")
    pd.testing.assert_frame_equal(written.sort_values(order, ignore_index=True), clean.sort_values(order, ignore_index=True), check_dtype=False)
    told = told.set_index("step")["rows touched"]
    assert report["rows touched"].tolist()[1:] == [told["missing query"], told["impossible values"], told["exact duplicates"], told["bot-like sessions"]]


def test_clean_log_refuses_and_leaves_nothing(tmp_path):
    log = log_with_bots(5)
    log.to_parquet(tmp_path / "log.parquet")
    for how, what in (({"user": "client"}, "client"), ({"columns": {"query": "query", "item_id": "item_id", "user_id": "user_id", "kind": "timestamp"}}, "epoch_ms"), ({"now": "1991-01-01"}, "no row")):
        with pytest.raises(DataError, match=what):
            clean_log(tmp_path / "log.parquet", tmp_path / "clean.parquet", **how)
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


@pytest.mark.skipif(data_root() is None, reason="the data folder is not here")
def test_real_tables():
    judged = read_table(data_root() / "home_depot_train.csv.gz", columns={"search_term": "query", "product_title": "item_text", "relevance": "label"})
    assert find_conflicts(judged, normalise=False)["group"].nunique() == 392
    clean, report = clean_samples(judged)
    assert 0.99 * len(judged) < len(clean) < len(judged)
    assert (clean_samples(clean)[1].set_index("step")["rows touched"].drop("contradicting labels") == 0).all()


def test_every_repair_is_described():
    assert list(REPAIRS) == ["characters", "invisible", "html", "spaces"] and all(done for _, done in REPAIRS.values())
    assert drop_invisible("plain") == "plain"
