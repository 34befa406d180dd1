"""What is drawn is what the records hold: numbers with known answers, and one look at each file."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import made_up
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from orchestrator import canvas, figures
from orchestrator.plots_cost import cost_by_stage, scaled, stage_costs
from orchestrator.plots_effects import BATCH, SEQUENCE, effects, heat_maps, within_seeds
from orchestrator.plots_layers import blocks
from orchestrator.plots_pareto import pareto, tradeoffs
from orchestrator.plots_ranks import rank_history, ranks_against_tokens
from orchestrator.plots_throughput import ratios, throughput
from orchestrator.plots_training import lines
from orchestrator.records import TEACHER, BlockScore, CurvePoint, Records, StageRecord, TrialRecord

RECORDS = made_up.records()


def trial(
    name: str, seed: int = 0, metrics: Mapping[str, float] | None = None, **fields: object
) -> TrialRecord:
    """A completed trial of the grid with the one axis `way`."""
    whole = made_up.trial("perplexity", seed, 0, {})
    chosen = {"trial_id": f"{name}-{seed}", "axes": {"way": name}, "metrics": dict(metrics or {})}
    return replace(whole, **{**chosen, **fields})  # type: ignore[arg-type]


def sweep(trials: Sequence[TrialRecord], **parts: object) -> Records:
    return Records("s", "p", trials=tuple(trials), **parts)  # type: ignore[arg-type]


def points(trial_id: str, values: Sequence[float], name: str = "heldout_loss") -> list[CurvePoint]:
    """A curve with a value every 10 tokens."""
    return [
        CurvePoint(trial_id, step, 10 * step, 0, name, value)
        for step, value in enumerate(values, 1)
    ]


# --- all figures -----------------------------------------------------------------------------


def everything() -> Records:
    """Records for which every figure has something to show."""
    grid = []
    for number, (batch, sequence) in enumerate((b, s) for b in ("l2", "mean") for s in "ab"):
        for seed in (0, 1):
            loss = 2.0 + number / 10 + seed / 100
            metrics = {
                "accuracy.mean": 0.9 - number / 10, "lm_loss.before": loss + 1,
                "lm_loss.after": loss, "throughput.in8_out8_b1": 1.5 + number,
            }  # fmt: skip
            axes = {BATCH: batch, SEQUENCE: sequence}
            one = trial(f"{batch}-{sequence}", seed, metrics, axes=axes)
            grid.append(replace(one, parameters=1000 - 100 * number))
    curves = [p for t in grid for p in points(t.trial_id, [3, 2, t.metrics["lm_loss.after"] or 0])]
    return replace(
        RECORDS,
        trials=(*RECORDS.trials, *grid),
        curves=(*RECORDS.curves, *curves),
        scores=(*RECORDS.scores, *(replace(s, name="block_influence") for s in RECORDS.scores)),
    )


NAMES = [
    "main_effects",
    "aggregations",
    "pareto",
    "throughput",
    "loss_curves",
    "ranks_against_tokens",
    "layer_importance_lm_loss",
    "layer_importance_accuracy",
    "layer_importance_block_influence",
    "cost_by_stage",
]


@pytest.fixture(scope="module")
def drawn() -> tuple[canvas.Drawing, ...]:
    return figures.all_figures(everything())


def test_each_figure_is_drawn_where_it_has_something_to_show(
    drawn: Sequence[canvas.Drawing],
) -> None:
    assert [each.name for each in drawn] == NAMES
    assert figures.all_figures(Records("s", "p")) == ()


def test_the_same_records_give_the_same_bytes(
    drawn: Sequence[canvas.Drawing], tmp_path: Path
) -> None:
    first = figures.write(drawn, tmp_path / "a")
    again = figures.write(figures.all_figures(everything()), tmp_path / "b")
    assert len(first) == 2 * len(NAMES)
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in again]


def test_a_figure_that_is_not_drawn_any_more_goes(
    drawn: Sequence[canvas.Drawing], tmp_path: Path
) -> None:
    figures.write(drawn[:2], tmp_path)
    paths = figures.write(drawn[:1], tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_type_is_at_least_8_points_and_no_figure_is_wider_than_a_page(
    drawn: Sequence[canvas.Drawing],
) -> None:
    for each in drawn:
        text = each.svg().decode()
        sizes = {float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)}
        assert sizes and min(sizes) >= 8, each.name  # a user unit is a point: see the view box
        width, box = re.search(r'width="([\d.]+)pt".*viewBox="0 0 ([\d.]+)', text).groups()  # type: ignore[union-attr]
        assert float(width) == float(box) <= 72 * canvas.WIDTH + 0.01


def test_a_dark_page_gets_light_ink_and_no_ground(drawn: Sequence[canvas.Drawing]) -> None:
    for each in drawn:
        text = each.svg().decode()
        sheet = re.search(r"prefers-color-scheme:dark\)\{(.*?)\}</style>", text)
        assert sheet is not None
        used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text.replace(sheet[0], "")))
        changed = {light.lower() for light in canvas.DARK} & used
        assert canvas.INK.lower() in changed
        assert "#ffffff" not in used and "#000000" not in used, each.name
        for light in changed:
            assert (
                f'[style*="fill: {light}"]{{fill:{canvas.DARK[light.upper()].lower()}' in sheet[1]
            )


def luminance(colour: str) -> float:
    channels = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_on_paper_and_screen_and_so_have_lines_in_the_dark() -> None:
    for ink in (canvas.INK, canvas.SOFT):
        assert contrast(ink, "#FFFFFF") >= 4.5
        assert contrast(canvas.DARK[ink], "#18181B") >= 4.5
    for colour in canvas.PALETTE:
        assert contrast(canvas.DARK[colour], "#18181B") >= 4.5


def test_lines_differ_by_more_than_their_colour() -> None:
    looks = [canvas.series(number) for number in range(12)]
    for style in ("marker", "linestyle"):
        assert len({str(look[style]) for look in looks[:8]}) == 8
    assert len({(look["color"], look["marker"], str(look["linestyle"])) for look in looks}) == 12


def test_files_carry_no_date_and_are_small(drawn: Sequence[canvas.Drawing]) -> None:
    for each in drawn:
        svg, png = each.svg(), each.png()
        assert not re.search(rb"<dc:date>|20\d\d-\d\d-\d\d", svg)
        assert len(svg) < 100_000 and len(png) < 150_000
        with Image.open(io.BytesIO(png)) as image:
            assert image.getpixel((0, 0)) is not None
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_png_has_the_colours_of_its_lines() -> None:
    grid = [trial(str(n)) for n in range(8)]
    curves = [p for n, t in enumerate(grid, 1) for p in points(t.trial_id, [n, n / 2], "kd_loss")]
    drawing = figures.loss_curves(sweep(grid, curves=tuple(curves)))
    assert drawing is not None
    with Image.open(io.BytesIO(drawing.png())) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1000)}  # type: ignore[union-attr]
    for name in canvas.PALETTE:
        assert tuple(int(name[n : n + 2], 16) for n in (1, 3, 5)) in colours


def test_names_of_configurations_are_text_and_harmless() -> None:
    names = ["<script>alert(1)</script>", "$x^2$", "a & b", "0.000345"]
    grid = [trial(name, 0, {"accuracy.mean": n / 10}) for n, name in enumerate(names)]
    (drawing,) = (d for d in figures.all_figures(sweep(grid)) if d.name == "main_effects")
    root = ElementTree.fromstring(drawing.svg())
    texts = {"".join(each.itertext()).strip() for each in root.iter() if each.tag.endswith("text")}
    assert set(names) <= texts
    assert not [each for each in root.iter() if each.tag.endswith("script")]


def test_every_caption_says_how_many_seeds_or_that_there_is_no_interval(
    drawn: Sequence[canvas.Drawing],
) -> None:
    for each in drawn:
        assert re.search(r"seed|teachers|One teacher", each.caption), each.caption
        assert "interval" in each.caption or "lowest to the highest" in each.caption, each.caption


# --- names -----------------------------------------------------------------------------------


def test_a_long_name_is_broken_and_loses_its_middle_but_never_its_room() -> None:
    text = "learning_rate=0.003, loss=forward_kl_and_cross_entropy_and_more, criterion=perplexity"
    shown = canvas.fit(text, 2.0, 2)
    assert len(shown.split("\n")) == 2
    assert all(canvas.inches(row) <= 2.0 for row in shown.split("\n"))
    assert shown.startswith("learning_rate") and shown.endswith("perplexity")
    assert canvas.fit("short", 2.0) == "short"


def test_what_all_names_repeat_stands_above_them() -> None:
    title, short = canvas.brief(["a=1, b=x", "a=2, b=x", "random_init"])
    assert title == "a, b"
    assert short == {"a=1, b=x": "1, x", "a=2, b=x": "2, x", "random_init": "random_init"}
    names = ["a=1", "b=1"]
    assert canvas.brief(names) == ("", {name: name for name in names})


# --- layers ----------------------------------------------------------------------------------


def importance(values: Mapping[int, Sequence[float]], name: str = "lm_loss") -> Records:
    """One stage a seed, which measured without each single layer."""
    stages, scores = [], []
    for seed, found in values.items():
        stages.append(StageRecord(f"i-{seed}", f"a-{seed}", "importance", False, 1, 0, 1, 1, 1, 1))
        scores += [BlockScore(f"i-{seed}", "x", 1, n, name, v) for n, v in enumerate(found)]
    trials = [trial("a", seed) for seed in values]
    return sweep(trials, stages=tuple(stages), scores=tuple(scores))


def test_several_seeds_are_taken_together_with_students_t() -> None:
    (found,) = blocks(importance({0: [1.0, 5.0], 1: [2.0, 5.0], 2: [3.0, 5.0]}), "lm_loss")
    assert (found.seeds, found.interval) == (3, "seeds")
    (line,) = found.lines
    assert line.layers == (1, 2)
    assert [each.value for each in line.values] == [2.0, 5.0]
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert line.values[0].high == pytest.approx(2.0 + half)
    assert line.values[1].low == line.values[1].high == 5.0


@pytest.mark.parametrize(
    ("seeds_of_teachers", "repeated"), [((0, 1), "2 teachers"), ((0,), "2 draws of calibration")]
)
def test_a_caption_calls_seeds_teachers_only_where_each_has_its_own(
    seeds_of_teachers: Sequence[int], repeated: str
) -> None:
    records = importance({0: [1.0, 5.0], 1: [2.0, 5.0]})
    teachers = [trial("t", seed, baseline=TEACHER, axes={}) for seed in seeds_of_teachers]
    drawing = figures.layer_importance(
        replace(records, trials=(*records.trials, *teachers)), "lm_loss"
    )
    assert drawing is not None
    assert repeated in drawing.caption


def test_one_teachers_accuracy_has_wilsons_interval_over_its_questions() -> None:
    records = importance({0: [0.5, 0.9]}, "accuracy")
    asked = {"importance": {"tasks": [{"limit": 6}, {"limit": 4}]}}
    records = replace(records, trials=tuple(replace(t, config=asked) for t in records.trials))
    (found,) = blocks(records, "accuracy")
    assert (found.interval, found.questions) == ("questions", 10)
    low, high = 0.2366, 0.7634  # Wilson's for 5 of 10
    assert found.lines[0].values[0].low == pytest.approx(low, abs=1e-4)
    assert found.lines[0].values[0].high == pytest.approx(high, abs=1e-4)


def test_questions_that_the_settings_do_not_tell_give_no_interval() -> None:
    for tasks in ([{"limit": 7}], [{"limit": None}], []):
        records = importance({0: [0.5, 0.9]}, "accuracy")
        asked = {"importance": {"tasks": tasks}}
        records = replace(records, trials=tuple(replace(t, config=asked) for t in records.trials))
        (found,) = blocks(records, "accuracy")
        assert (found.interval, found.questions) == ("none", None)


def test_stages_of_different_configurations_have_a_panel_each() -> None:
    records = importance({0: [1.0], 1: [2.0]})
    other = replace(records.trials[1], axes={"way": "other"})
    found = blocks(replace(records, trials=(records.trials[0], other)), "lm_loss")
    assert [each.seeds for each in found] == [1, 1]
    assert [each.title for each in found] == ["x: way=a", "x: way=other"]


def test_a_seed_that_the_sweep_no_longer_asks_for_is_no_round_of_pruning() -> None:
    records = importance({0: [1.0], 1: [2.0], 2: [9.0]})
    *kept, left = records.trials
    left_over = replace(records, trials=(*kept, replace(left, in_sweep=False)))
    assert blocks(left_over.asked, "lm_loss") == blocks(importance({0: [1.0], 1: [2.0]}), "lm_loss")


def test_a_measurement_stays_while_one_trial_that_read_it_is_asked_for() -> None:
    records = importance({0: [1.0]})
    (stage,), (kept,) = records.stages, records.trials
    also = replace(kept, trial_id="left", in_sweep=False)
    shared = (replace(stage, trial_id="left"), replace(stage, cached=True))
    asked = replace(records, trials=(kept, also), stages=shared).asked
    assert blocks(asked, "lm_loss") == blocks(records, "lm_loss")


def test_layers_count_from_one_and_the_intact_model_is_dashed() -> None:
    drawing = figures.layer_importance(RECORDS, "lm_loss")
    assert drawing is not None
    known = [line for line in drawing.figure.axes[0].get_lines() if len(line.get_xdata())]
    assert list(known[0].get_xdata()) == list(range(1, 9))
    assert list(known[2].get_xdata()) == [4, 5, 6, 7, 8]
    assert known[-1].get_label() == "intact model"
    assert known[-1].get_linestyle() == "--"
    assert set(known[-1].get_ydata()) == {1.9}


# --- training --------------------------------------------------------------------------------


def test_a_line_is_the_mean_over_seeds_as_far_as_all_of_them_went() -> None:
    curves = [*points("a-0", [1, 2, 3, 4]), *points("a-1", [3, 4])]
    (line,) = lines(sweep([trial("a", 0), trial("a", 1)], curves=tuple(curves)), "heldout_loss")
    assert (line.tokens, line.mean, line.seeds) == ((10, 20), (2, 3), 2)
    assert (line.low, line.high) == ((1, 2), (3, 4))


def test_a_stopped_seed_does_not_cut_the_line_of_those_that_completed() -> None:
    curves = (*points("a-0", [1, 2, 3, 4]), *points("a-1", [9]))
    grid = [trial("a", 0), replace(trial("a", 1), status="stopped")]
    (line,) = lines(sweep(grid, curves=curves), "heldout_loss")
    assert (line.tokens, line.mean, line.seeds) == ((10, 20, 30, 40), (1, 2, 3, 4), 1)
    stopped = [replace(each, status="stopped") for each in grid]
    (line,) = lines(sweep(stopped, curves=curves), "heldout_loss")
    assert (line.tokens, line.seeds) == ((10,), 2)


def test_more_configurations_than_colours_stay_readable() -> None:
    grid = [trial(str(n)) for n in range(20)]
    curves = [p for n, t in enumerate(grid, 1) for p in points(t.trial_id, [n, n], "kd_loss")]
    drawing = figures.loss_curves(sweep(grid, curves=tuple(curves)))
    assert drawing is not None
    found = drawing.figure.axes[0].get_lines()
    named = [str(line.get_label()) for line in found if line.get_color() != canvas.GREY]
    assert named == [f"way={n}" for n in range(7)]
    assert len(found) == 20
    assert "Grey" in drawing.caption


def test_a_configuration_that_lacks_the_usual_curves_gets_a_panel_that_has_it() -> None:
    grid = [trial("distilled"), trial("conventional")]
    both = [p for t in grid for p in points(t.trial_id, [2, 1], "ce_loss")]
    curves = (*points("distilled-0", [2, 1], "kd_loss"), *both)
    drawing = figures.loss_curves(sweep(grid, curves=curves))
    assert drawing is not None
    labels = [{str(line.get_label()) for line in axes.get_lines()} for axes in drawing.figure.axes]
    assert labels == [{"way=distilled"}, {"way=distilled", "way=conventional"}]


def test_a_configuration_looks_the_same_in_every_panel() -> None:
    grid = [trial("a"), trial("b")]
    curves = [
        *points("a-0", [1, 2]), *points("b-0", [1, 2]),
        *points("b-0", [1, 2], "kd_loss"),
    ]  # fmt: skip
    drawing = figures.loss_curves(sweep(grid, curves=tuple(curves)))
    assert drawing is not None
    looks = [
        {str(line.get_label()): line.get_color() for line in axes.get_lines()}
        for axes in drawing.figure.axes
    ]
    assert looks[1]["way=b"] == looks[0]["way=b"] != looks[0]["way=a"]


# --- ranks -----------------------------------------------------------------------------------

# At the first point the order is turned round, at the second two neighbours are, then none.
FLIPPING = {"a": [4, 1, 1, 1], "b": [3, 3, 2, 2], "c": [2, 2, 3, 3], "d": [1, 4, 4, 4]}


def flipping(name: str = "heldout_loss", seeds: Sequence[int] = (0, 1)) -> Records:
    grid = [trial(way, seed) for way in FLIPPING for seed in seeds]
    curves = [p for t in grid for p in points(t.trial_id, FLIPPING[str(t.axes["way"])], name)]
    return sweep(grid, curves=tuple(curves))


def test_agreement_with_the_last_ranking_is_kendalls_tau() -> None:
    history = rank_history(flipping())
    assert history is not None
    assert (history.measure, history.seeds, history.tokens) == ("heldout_loss", 2, (10, 20, 30, 40))
    # 4 configurations have 6 pairs: all turned round; one of them; none.
    assert [each.value for each in history.agreement] == pytest.approx([-1, 4 / 6, 1, 1])
    assert list(history.ranks) == ["way=a", "way=b", "way=c", "way=d"]
    assert history.ranks["way=b"] == (3, 3, 2, 2)
    assert history.settled == 30


def test_a_ranking_that_flips_until_the_end_never_settled() -> None:
    records = flipping()
    kept = tuple(point for point in records.curves if point.tokens < 30)
    history = rank_history(replace(records, curves=kept))
    assert history is not None and history.settled is None
    drawing = ranks_against_tokens(replace(records, curves=kept))
    assert drawing is not None and "does not stay" in drawing.caption


def test_agreement_is_found_within_each_seed_and_then_averaged() -> None:
    grid = [trial(way, seed) for way in "abcd" for seed in (0, 1)]
    rising = {way: float(place) for place, way in enumerate("abcd")}
    curves = []
    for each in grid:
        first, last = rising[str(each.axes["way"])], (1, -1)[each.seed]
        curves += points(each.trial_id, [first, first * last])
    history = rank_history(sweep(grid, curves=tuple(curves)))
    assert history is not None
    # One seed keeps its order and one turns it round; over the means there would be no ranking.
    assert history.agreement[0].value == pytest.approx(0.0)


def test_without_held_out_points_windows_of_the_training_loss_rank_and_the_caption_says_so() -> (
    None
):
    values = [1.0, 3.0] * 12
    grid = [trial(str(n)) for n in range(4)]
    curves = [
        p for n, t in enumerate(grid) for p in points(t.trial_id, [v + n for v in values], "loss")
    ]
    records = sweep(grid, curves=tuple(curves))
    history = rank_history(records)
    assert history is not None
    assert len(history.tokens) == 12 and history.tokens[-1] == 240
    assert set(history.ranks["way=0"]) == {1.0}
    drawing = ranks_against_tokens(records)
    assert drawing is not None and "no held-out points were recorded" in drawing.caption


def test_students_whose_losses_measure_different_things_are_not_ranked() -> None:
    records = flipping("kd_loss")
    assert rank_history(records) is not None
    losses = ({"distill": {"loss": {"logits": kind}}} for kind in ("mse", "forward_kl") * 4)
    trials = tuple(replace(t, config=c) for t, c in zip(records.trials, losses, strict=True))
    assert rank_history(replace(records, trials=trials)) is None


def test_three_configurations_are_no_ranking() -> None:
    records = flipping()
    assert rank_history(replace(records, trials=records.trials[:6])) is None


# --- effects ---------------------------------------------------------------------------------


def test_what_the_trials_of_a_seed_share_does_not_widen_an_interval() -> None:
    values = {"a": {0: [1.0], 1: [11.0]}, "b": {0: [2.0, 2.0], 1: [12.0]}}
    found = within_seeds(values)
    assert [found[key].value for key in "ab"] == [6.0, 7.0]
    assert all(each.half_width == pytest.approx(0.0) for each in found.values())


def test_the_interval_within_seeds_is_that_of_the_paired_difference() -> None:
    # For two values Morey's interval is half of the difference's, times the square root of two.
    first, second = [1.0, 4.0, 2.5], [2.0, 3.5, 2.0]
    found = within_seeds(
        {"a": {n: [v] for n, v in enumerate(first)}, "b": {n: [v] for n, v in enumerate(second)}}
    )
    differences = np.array(first) - np.array(second)
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert found["a"].half_width == pytest.approx(half / 2 * math.sqrt(2))


def test_who_alone_lacks_the_hard_seed_does_not_stand_better_for_that() -> None:
    easy, hard = {0: [1.0], 1: [3.0], 2: [6.0]}, {0: [1.1], 1: [3.101]}
    found = within_seeds({"a": easy, "b": hard})
    assert found["b"].value - found["a"].value == pytest.approx(0.1, abs=0.001)


def test_main_effects_are_means_over_the_other_axes() -> None:
    grid = [
        trial(f"{a}{b}", seed, {"lm_loss.after": a + 10 * b}, axes={"a": a, "b": b})
        for a in (1, 2)
        for b in (1, 3)
        for seed in (0, 1)
    ]
    away = trial("r", 0, {"lm_loss.after": 99.0}, baseline="random_init", axes={})
    whole = sweep([*grid, away, replace(away, trial_id="r-1", seed=1)])
    found = effects(whole, "lm_loss.after")
    assert found is not None and found.over == "seeds"
    known = {(each.axis, each.value): each.estimate.value for each in found.effects}
    assert known == {
        ("a", "1"): 21, ("a", "2"): 22, ("b", "1"): 11.5, ("b", "3"): 31.5,
        ("baselines", "random_init"): 99,
    }  # fmt: skip


def test_values_that_are_numbers_stand_in_their_order() -> None:
    grid = [trial(str(v), 0, {"lm_loss.after": v}, axes={"keep": v}) for v in (10, 0.5, 2)]
    found = effects(sweep(grid), "lm_loss.after")
    assert found is not None and found.over == "nothing"
    assert [each.value for each in found.effects] == ["0.5", "2", "10"]


def test_with_one_seed_an_accuracys_interval_is_over_questions() -> None:
    one = tuple(t for t in RECORDS.trials if t.seed == 0)
    found = effects(replace(RECORDS, trials=one), "accuracy.mean")
    assert found is not None and found.over == "questions"
    for each in found.effects:
        assert each.estimate.low is not None and each.estimate.high is not None
        assert each.estimate.low < each.estimate.value < each.estimate.high


def test_an_axis_with_one_value_has_no_effect() -> None:
    assert effects(sweep([trial("a", 0, {"lm_loss.after": 1.0})]), "lm_loss.after") is None


def test_a_heat_map_holds_each_pairs_mean_before_and_after() -> None:
    before, after = heat_maps(everything())
    assert (before.title, after.title) == ("before retraining", "after retraining")
    assert before.cells["l2", "a"].value == pytest.approx(3.005)
    assert after.cells["mean", "b"].value == pytest.approx(2.305)
    assert before.best == after.best == ("l2", "a")
    assert heat_maps(RECORDS) == ()


# --- Pareto, cost, throughput ----------------------------------------------------------------


def test_pareto_marks_and_names_the_front_alone() -> None:
    grid = [
        trial(name, 0, {"lm_loss.after": loss}, parameters=size)
        for name, size, loss in (("small", 1, 3.0), ("large", 9, 1.0), ("bad", 9, 4.0))
    ]
    teacher = trial(TEACHER, 0, {"lm_loss.after": 0.5}, parameters=20, baseline=TEACHER, axes={})
    records = sweep([*grid, teacher])
    (found,) = tradeoffs(records, "lm_loss.after").values()
    assert {p.label for p in found if p.efficient} == {"way=small", "way=large"}
    drawing = pareto(records, "lm_loss.after")
    assert drawing is not None
    text = drawing.svg().decode()
    assert "1 small" in text and "2 large" in text and "bad" not in text


def test_long_intervals_leave_the_figure_and_the_caption_says_so() -> None:
    losses = {"small": (1, 3.0, 3.1), "large": (9, 1.0, 9.0)}
    for seeds, leave in ((1, False), (2, True)):
        grid = [
            trial(name, seed, {"lm_loss.after": found[seed]}, parameters=size)
            for name, (size, *found) in losses.items()
            for seed in range(seeds)
        ]
        drawing = pareto(sweep(grid), "lm_loss.after")
        assert drawing is not None
        assert ("leave the figure" in drawing.caption) == leave


def test_where_all_students_cost_the_same_there_is_no_front_to_draw() -> None:
    grid = [trial(name, 0, {"lm_loss.after": 1.0}, parameters=5) for name in "ab"]
    assert tradeoffs(sweep(grid), "lm_loss.after") == {}
    assert pareto(sweep(grid), "lm_loss.after") is None


def test_cost_is_what_was_spent_and_what_others_would_have_paid() -> None:
    def stage(id_: str, trial_id: str, kind: str, cached: bool, cpu_s: float) -> StageRecord:
        return StageRecord(id_, trial_id, kind, cached, cpu_s, 0.0, cpu_s, 1.0, 1, 1.0)

    stages = (
        stage("p", "a-0", "pretrain", False, 100.0),
        stage("p", "b-0", "pretrain", True, 0.0),
        stage("p", "c-0", "pretrain", True, 0.0),
        stage("e", "a-0", "evaluate", False, 5.0),
        stage("elsewhere", "a-0", "importance", True, 0.0),
    )
    records = sweep([trial(n) for n in "abc"], stages=stages)
    costs = {each.kind: each for each in stage_costs(records, "cpu_s")}
    assert (costs["pretrain"].spent, costs["pretrain"].saved) == (100.0, 200.0)
    assert (costs["evaluate"].spent, costs["evaluate"].saved) == (5.0, 0.0)
    assert (costs["importance"].run, costs["importance"].saved) == (0, 0.0)
    drawing = cost_by_stage(records)
    assert drawing is not None
    assert "2 of 5 stages asked for were run" in drawing.caption
    assert "1.8 CPU minutes instead of 5.1 (66% saved)" in drawing.caption
    assert "GPU" not in drawing.caption


def test_seconds_are_told_in_a_unit_of_which_there_are_some() -> None:
    assert [scaled(s)[1] for s in (0.1, 80, 100, 6000, 1e6)] == [
        "seconds", "seconds", "minutes", "hours", "days"
    ]  # fmt: skip


def test_throughput_is_the_mean_over_seeds_or_the_spread_of_the_rounds() -> None:
    name = "in64_out32_b4"
    first = {f"throughput.{name}": 2.0, f"throughput_low.{name}": 1.8, "throughput.mean": 2.0}
    one = ratios(sweep([trial("a", 0, {**first, f"throughput_high.{name}": 2.3})]))
    ((combo, known),) = one["trial"].items()
    assert (combo.input, combo.output, combo.batch, combo.teacher_batch) == (64, 32, 4, 4)
    assert (known.value, known.low, known.high) == (2.0, 1.8, 2.3)
    both = ratios(sweep([trial("a", s, {f"throughput.{name}": 2.0 + s}) for s in (0, 1)]))
    ((_, known),) = both["trial"].items()
    assert known.value == 2.5
    assert known.high == pytest.approx(2.5 + stats.t.ppf(0.975, 1) * math.sqrt(0.5 / 2))


def test_a_throughput_caption_counts_the_seeds_that_were_timed() -> None:
    def drawn(*timed: tuple[str, Sequence[int]]) -> str:
        grid = [
            trial(name, s, {"throughput.in8_out8_b1": 1.5 + s / 10} if s in seeds else {})
            for name, seeds in timed
            for s in range(3)
        ]
        drawing = throughput(sweep(grid))
        assert drawing is not None
        return drawing.caption

    assert "means over 2 seeds" in drawn(("a", [1, 2]), ("b", [1, 2]))
    assert "one seed;" in drawn(("a", [1]), ("b", [1]))
    assert "and of what was timed once" in drawn(("a", [0, 1, 2]), ("b", [0]))


def test_the_published_ratios_stand_beside_ours_with_their_source() -> None:
    grid = [trial(n, 0, {"throughput.in8_out8_b1": v}) for n, v in (("slow", 1.2), ("fast", 1.9))]
    drawing = throughput(sweep(grid))
    assert drawing is not None
    lines_at = {
        str(line.get_label()): set(line.get_ydata()) for line in drawing.figure.axes[0].get_lines()
    }
    assert lines_at["published, depth: 2.7"] == {2.7}
    assert lines_at["published, width: 1.8"] == {1.8}
    assert "arXiv 2408.11796" in drawing.caption
    assert throughput(RECORDS) is None
