"""Figures: every one is drawn from hand-made streams, and its points are those of the stream."""

from pathlib import Path

import polars as pl
import pytest
from matplotlib.figure import Figure

from moe_lab import frames, plots
from runs import DENSE, Story, write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plots") / "run", Story(epochs=6, trained=6))


@pytest.fixture(scope="module")
def frame(run: Path) -> pl.DataFrame:
    return frames.read_metrics(run)


def drawn(figure: Figure, label: str) -> list[tuple[float, float]]:
    """The points of a line, whose pieces (one a phase) share a label up to its last value."""
    names = (f"{label}:", f"_{label}")
    lines = [line for axes in figure.axes for line in axes.get_lines() if str(line.get_label()).startswith(names)]
    return [(float(x), float(y)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def points(frame: pl.DataFrame, kind: str, name: str) -> list[tuple[float, float]]:
    """The points that should be drawn, from the rows as they stand in the stream."""
    values = frame.filter((pl.col("kind") == kind) & pl.col(name).is_not_null())[name].to_list()
    return [(float(index), value) for index, value in enumerate(values, start=1)]


MEASURES = [
    (plots.loss, "training", "eval", "epoch/loss"),
    (plots.loss, "entropy floor", "eval", "epoch/floor"),
    (plots.routing, "block 1", "moe", "moe/layer_01/experts_per_token"),
    (plots.routing, "mean", "moe", "moe/experts_per_token"),
    (plots.entropy, "block 2", "moe", "moe/layer_02/router_entropy"),
    (plots.l0, "mean, min to max", "eval", "epoch/l0_mean"),
]


@pytest.mark.parametrize(("draw", "label", "kind", "name"), MEASURES)
def test_the_plotted_points_are_those_of_the_stream(
    frame: pl.DataFrame, draw: type, label: str, kind: str, name: str
) -> None:
    assert drawn(draw(frame), label) == points(frame, kind, name)
    assert len(points(frame, kind, name)) == 12


def test_learning_rate_and_gradients_are_means_over_the_steps(frame: pl.DataFrame) -> None:
    rows = frames.epochs(frame)
    assert drawn(plots.learning_rate(frame), "schedule") == list(
        rows.select("index", "train/learning_rate").iter_rows()
    )
    output = list(rows.select("index", "grad/layer_14/param_norm").iter_rows())
    assert drawn(plots.gradients(frame), "output") == output


def test_the_heat_map_shows_the_load_over_the_fair_load(frame: pl.DataFrame) -> None:
    figure = plots.utilisation(frame)
    image = figure.axes[0].get_images()[0].get_array()
    assert image is not None
    assert image.shape == (8, 12)
    assert image[0].tolist() == pytest.approx([1.6] * 12)


def test_save_all_writes_readable_pictures(run: Path) -> None:
    paths = plots.save_all(run)
    assert {path.stem for path in paths} == set(plots.FIGURES)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


def test_a_dense_run_has_no_figures_of_routing(tmp_path: Path) -> None:
    paths = plots.save_all(write(tmp_path / "run", Story(router=DENSE, epochs=3, trained=3)))
    assert {path.stem for path in paths} == set(plots.FIGURES) - set(plots.SPARSE)


def test_a_run_of_one_epoch_is_drawn_by_steps(tmp_path: Path) -> None:
    rows = [
        {"step": step, "kind": "train", "phase": "text", "epoch": 1, "train/loss": 3.0 / step} for step in (1, 2, 3)
    ]
    assert drawn(plots.loss(frames.frame_of(rows)), "training") == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_a_notebook_shows_figures_without_pyplot(frame: pl.DataFrame) -> None:
    figure = plots.loss(frame)
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")


def lines(figure: Figure) -> set[str]:
    """What is written at the ends of lines and beside bounds."""
    return {text.get_text().partition(":")[0] for axes in figure.axes for text in axes.texts}


def test_texts_and_documents_have_figures_of_their_own(tmp_path: Path) -> None:
    """Nats per character and nats per word on one scale say nothing, and the target is one of documents."""
    story = Story(epochs=3, trained=3)
    stories = {"stage1": story, "text": story.but(text=True), "stage4b": story.but(text=True, loss=1.7)}
    streams = {name: [frames.read_metrics(write(tmp_path / name, each))] for name, each in stories.items()}
    figures = plots.comparisons(streams)
    assert set(figures) == {"loss", "experts", "l0", "text_loss", "text_experts", "text_l0"}
    assert lines(figures["loss"]) == {"stage1", plots.DASHES + "entropy floor", "target 0.4"} | {"facts", "chat"}
    assert lines(figures["text_loss"]) == {"text", "stage4b"}
    assert lines(figures["text_l0"]) == {"text", "stage4b"}
    held_out = points(streams["stage4b"][0], "eval", "eval/loss")
    assert drawn(figures["text_loss"], "stage4b") == held_out
    alone = plots.comparisons({"text": streams["text"]})
    assert set(alone) == {"text_loss", "text_experts", "text_l0"}


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no metrics yet"):
        plots.save_all(tmp_path)


def test_the_sweep_draws_a_point_for_every_run() -> None:
    summaries = [{"p": p, "loss": 0.2 + p, "experts_per_token": 1 + p} for p in (0.3, 0.3, 0.5)]
    lines = plots.sweep(summaries).axes[0].get_lines()
    assert list(lines[0].get_xdata()) == [0.3, 0.3, 0.5]
    assert list(lines[1].get_ydata()) == pytest.approx([0.5, 0.7])


def test_nine_models_are_told_apart_and_their_ends_stand_above_the_floor(frame: pl.DataFrame) -> None:
    losses = {f"model {order}": 0.2 + 0.01 * order for order in range(9)}
    models = {name: [frame.with_columns(pl.col("epoch/loss") * (loss / 0.21))] * 2 for name, loss in losses.items()}
    figure = plots.comparisons(models)["loss"]
    whole, ends = figure.axes
    looks = {(line.get_color(), line.get_linestyle()) for line in whole.get_lines() if ":" in str(line.get_label())}
    assert len(looks) == 10  # the floor too
    end = {str(line.get_label()).partition(":")[0]: line for line in ends.get_lines()}
    for name, loss in losses.items():
        assert list(end[name].get_xdata()) == [10, 11, 12]  # the second half of the six epochs of chat
        assert end[name].get_ydata()[-1] == pytest.approx(loss - 0.17)


def test_a_shorter_model_shows_its_own_end_beside_a_longer_one(frame: pl.DataFrame, tmp_path: Path) -> None:
    longer = frames.read_metrics(write(tmp_path / "longer", Story(epochs=12, trained=12)))
    ends = plots.comparisons({"short": [frame], "long": [longer]})["loss"].axes[1]
    shown = {str(line.get_label()).partition(":")[0]: list(line.get_xdata()) for line in ends.get_lines()}
    assert shown["short"] == [10, 11, 12]
    assert shown["long"] == list(range(19, 25))


def test_a_model_has_one_colour_in_all_figures(frame: pl.DataFrame, tmp_path: Path) -> None:
    dense = frames.read_metrics(write(tmp_path / "dense", Story(DENSE, epochs=6, trained=6)))
    colours = [
        {line.get_color() for line in figure.axes[0].get_lines() if str(line.get_label()).startswith("sparse:")}
        for figure in plots.comparisons({"dense": [dense], "sparse": [frame]}).values()
    ]
    assert colours == [{plots.COLOURS[1]}] * 3


def test_models_without_a_floor_have_no_second_panel(frame: pl.DataFrame) -> None:
    figures = plots.comparisons({"model": [frame.drop("epoch/floor")]})
    assert all(len(figure.axes) == 1 for figure in figures.values())
