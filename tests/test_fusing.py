"""The Fuse tab's handlers: what comes from the page is checked, nothing is trained in public, nothing is overwritten."""

from __future__ import annotations

import time

import pytest

from components.fusing import curves, running
from components.fusing.figure import payload, reason
from components.fusing.planning import _shown, card
from components.fusing.setting import NAMES, demo_records, examples, one_dialogue, read
from components.jobs import Jobs
from components.studio import Studio
from fusion import FusionError, MismatchError, OutputError, RecipeError, demo
from fusion.distill.targets import Blend
from fusion.distill.view import AlignmentView, Expected, Group, Heard, Position, Token
from fusion.pairwise import FuseRecipe, Stage, plan
from fusion.pairwise.cost import predict
from fusion.pairwise.place import begin, is_run, recipe_of, records_file
from fusion.progress import Progress

HOSTILE = "<img src=x onerror=alert(1)>${alert(1)}{{x}}"
GIVEN = {"pivot": "demo/pivot", "sources": ["demo/source-qwen", "demo/source-neox"], "mode": "pairwise", "data": "demo", "count": 8,
         "path": "", "limit": 0, "lm_weight": 0.9, "learning_rate": 5e-4, "epochs": 1, "rule": "mince", "kind": "ce",
         "level": "dialogue", "batch": 4, "accumulate": 1, "max_steps": 0, "lora_rank": 0, "alignment": "offsets",
         "mapping": "spelling", "top_k": 10, "max_tokens": 512, "seed": 0, "name": "first"}


def values(**changes) -> tuple:
    return tuple({**GIVEN, **changes}[name] for name in NAMES)


@pytest.fixture
def studio(tmp_path):
    return Studio(outputs=tmp_path / "outputs")


def test_controls_make_a_recipe_that_can_be_written_and_read(studio):
    wish = read(studio, values(max_steps=7, level="turn"))
    recipe = FuseRecipe.from_yaml(wish.recipe.to_yaml())
    assert recipe == wish.recipe and recipe.names == ("source-qwen", "source-neox")
    assert recipe.training.max_steps == 7 and recipe.blend == Blend(level="turn") and recipe.training.learning_rate == 5e-4
    assert wish.out == studio.outputs / "first" and len(wish.records) == 8 == len(wish.dialogues())
    assert demo_records(8, 0) != demo_records(8, 1)


@pytest.mark.parametrize("changes", [
    {"pivot": "../pivot"}, {"pivot": None}, {"sources": []}, {"sources": "demo/pivot"}, {"sources": ["/etc"]},
    {"sources": ["demo/source-qwen"] * 2}, {"sources": [["demo/source-qwen"]]}, {"mode": "both"}, {"data": "theirs"}, {"count": 7},
    {"count": 10**6}, {"count": 8.5}, {"count": True}, {"count": "8"}, {"lm_weight": 1.1}, {"lm_weight": None},
    {"learning_rate": float("nan")}, {"learning_rate": 0}, {"epochs": -1}, {"epochs": 0}, {"batch": 0}, {"rule": "best"},
    {"level": "word"}, {"kind": "mse"}, {"mapping": "magic"}, {"alignment": None}, {"top_k": 0}, {"seed": -1}, {"name": "../first"},
    {"name": ".hidden"}, {"name": 3}, {"data": "own", "path": " "}, {"data": "own", "path": "x" * 2000}])
def test_what_makes_no_sense_is_refused(studio, changes):
    with pytest.raises(FusionError):
        read(studio, values(**changes))
    assert not studio.outputs.exists()


def test_strangers_get_the_recipe_but_neither_files_nor_a_training(tmp_path):
    public = Studio(outputs=tmp_path / "outputs", public=True)
    assert read(public, values()).recipe.check()
    with pytest.raises(RecipeError, match="public page"):
        read(public, values(data="own", path=str(demo.FOLDER)))
    with pytest.raises(RecipeError, match="public page"):
        running._start(public, Jobs(), {}, values())
    assert not (tmp_path / "outputs").exists()


def test_a_folder_of_something_else_is_left_alone(studio):
    (studio.outputs / "first").mkdir(parents=True)
    (studio.outputs / "first" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="overwritten"):
        read(studio, values())
    assert [path.name for path in (studio.outputs / "first").iterdir()] == ["mine.txt"]


def test_a_begun_run_goes_on_with_its_recipe_and_no_other(studio):
    wish = read(studio, values())
    begin(wish.recipe, wish.out, wish.records)
    assert is_run(wish.out) and recipe_of(wish.out) == wish.recipe and records_file(wish.out).read_bytes().count(b"\n") == 8
    begin(wish.recipe, wish.out, wish.records)
    with pytest.raises(MismatchError, match="other dialogues"):
        begin(wish.recipe, wish.out, read(studio, values(count=9)).records)
    with pytest.raises(MismatchError, match="top_k differ"):
        begin(read(studio, values(top_k=3)).recipe, wish.out, wish.records)
    assert "top_k differ" in _shown(studio, values(top_k=3), reading=False)[0]


def test_the_plan_has_every_stage_with_its_price(studio):
    html, recipe, command = _shown(studio, values(), reading=False)
    assert html.count("<tr>") == 10 and "Time left" in html and "Steps a target" in html
    assert "8 demo dialogues" in recipe and "fuse_recipe.yaml --out" in command
    wish = read(studio, values(batch=4, accumulate=1, epochs=3))
    price = predict(wish.recipe, wish.out, wish.dialogues())
    assert (price.dialogues, price.steps) == (8, 6) and len(price.seconds) == len(price.stages) == 9
    assert all(seconds > 0 for seconds in price.seconds) and predict(wish.recipe, wish.out) is None


def test_the_plan_of_ones_own_file_waits_to_be_asked(studio, tmp_path):
    asked = values(data="own", path=str(tmp_path / "none.jsonl"))
    assert "press Plan" in _shown(studio, asked, reading=False)[0]
    assert "no such file" in _shown(studio, asked, reading=True)[0]


def test_no_recipe_stands_where_the_controls_make_none(studio):
    html, recipe, command = _shown(studio, values(sources=[]), reading=False)
    assert "no source is picked" in html and recipe.startswith("# ") and "no source is picked" in recipe and command == ""


def test_names_in_the_plan_are_text():
    html = card([Stage("data", HOSTILE), Stage("training", HOSTILE, True)], None)
    assert "<img" not in html and html.count("&lt;img") == 2


def test_losses_are_drawn_for_what_has_begun():
    points = [{"step": n, "loss": 3.0 / n, "clm": 2.0 / n, "fusion": 4.0 / n} for n in range(1, 900)]
    html = curves.drawn({HOSTILE: points, "later": ()}, 0.9)
    assert html.count("<figure>") == 1 and html.count("<polyline") == 3 and "<img" not in html and len(html) < 30_000
    assert "3.00 → 0.00" in html and "0.9 · language model + 0.1 · fusion" in html
    assert curves.drawn({"later": ()}, 0.9) == ""
    assert "<polyline" in curves.drawn({"one": points[:1]}, 0.9)
    assert "nan" not in curves.drawn({"odd": [{**points[0], "loss": float("nan")}, points[1]]}, 0.9)


def seen(position: Position, **blend) -> AlignmentView:
    groups = (Group((0,), (0,), ((0, 0),)),)
    return AlignmentView(("Pivot", "NeoX"), Blend(**blend), (position,), (Token(HOSTILE, False, 0),), groups)


def position(**changes) -> Position:
    entries = tuple(Expected(f"t{i}", 0.1, i == 9) for i in range(10))
    basis = {"token": Token("go", False, 0), "source": 0, "pivot": entries, "mapped": entries[:2], "fused": entries[:2],
             "heard": (Heard("x", 0.45, "x", True, False), Heard("xy", 0.3, "x", True, True),
                       Heard(HOSTILE, 0.25, None, False, False)),
             "lost": 0.25, "chosen": 1, "deciding": (0.5, 0.25), "nats": (1.0, None), "pieces": ("g", HOSTILE),
             "read": 0.9, "kept": 0.8, "unwritten": 0.05}
    return Position(**{**basis, **changes})


def test_the_figure_gets_plain_data_with_the_true_token_and_what_was_lost():
    data = payload(seen(position()), 1)
    its = data["positions"][0]
    assert [entry["text"] for entry in its["pivot"]] == ["t0", "t1", "t2", "t3", "t4", "t5", "t9"] and its["pivot"][-1]["gold"]
    assert its["words"] == [{"text": HOSTILE, "chance": 0.25, "becomes": None}] and data["tokens"][0]["text"] == HOSTILE
    assert its["respelt"] == [{"text": "xy", "chance": 0.3, "becomes": "x"}] and its["other"] == 1.55
    assert (data["source"]["letter"], its["nats"], its["pieces"]) == ("B", [1.0, None], ("g", HOSTILE))
    assert data["facts"][-1] == {"value": "30.0%", "text": "of its words Pivot writes in other tokens"}
    assert [(fact["value"], fact["text"]) for fact in data["facts"][3:6]] == [
        ("80.0%", "of its mass is kept, 90.0% was read"),
        ("0%", "of the places that hear it are empty: less than half of its words was kept"),
        ("5.0%", "of its mass is on tokens that Pivot never writes")]
    lossy = payload(seen(position(), mapping="exact"))["facts"][-1]
    assert lossy == {"value": "25.0%", "text": "of its words are lost between the vocabularies"}


@pytest.mark.parametrize(("changes", "blend", "words"), [
    ({}, {}, "CE over the dialogue: Pivot 0.500, NeoX 0.250 nats per token of Pivot. MinCE takes the lower: NeoX's"),
    ({"chosen": 0, "deciding": (0.1, 0.2)}, {"level": "turn"}, "over this reply: Pivot 0.100, NeoX 0.200"),
    ({}, {"rule": "avgce", "level": "token"}, "on this token: Pivot 0.500, NeoX 0.250 nats. AvgCE mixes both"),
    ({"source": -1}, {}, "in the middle of a token"), ({"mapped": ()}, {}, "Less than half"),
    ({"inside": True}, {}, "Pivot is inside a token of NeoX here"),
    ({"deciding": (0.5, None)}, {"level": "token"}, "cannot be told")])
def test_why_a_model_was_chosen(changes, blend, words):
    its = position(**changes)
    assert words in reason(its, seen(its, **blend))


def test_a_dialogue_to_look_at_is_checked():
    assert len(examples()) > 8 and one_dialogue(*examples()[0]).turns == (examples()[0],)
    for asked, answer in (("", "x"), ("x", " "), (None, "x"), ("x", "y" * 4001)):
        with pytest.raises(RecipeError):
            one_dialogue(asked, answer)


def test_a_run_is_followed_to_its_new_models_and_is_not_started_twice(studio, monkeypatch):
    """The job itself, with a run that only makes folders: what the pipeline does is tested with the pipeline."""
    go = []

    def quick(recipe, out):
        while not go:
            time.sleep(0.01)
            yield Progress(Stage("training", "target-qwen").title, 1, 2, "steps")
        from fusion.pairwise import FuseResult
        return FuseResult({"target-qwen": demo.FOLDER / "pivot"}, None, {}, {})

    offered = []
    monkeypatch.setattr(running, "run", quick)
    monkeypatch.setattr(studio, "offer_output", offered.append)
    jobs, known = Jobs(), {}
    job = running._start(studio, jobs, known, values())
    with pytest.raises(RecipeError, match="going on already"):
        running._start(studio, jobs, known, values())
    watch = running._Watch(job, studio.outputs)
    until(lambda: job.progress is not None)
    status, _, stages = watch.changes()
    assert "Training target-qwen" in status and "running" in stages and "press Plan" not in stages
    go.append(True)
    until(lambda: job.ended)
    assert offered == [demo.FOLDER / "pivot"] and "menus of Models" in watch.changes()[0]
    assert watch.changes() == [None, None, None]
    assert not any(stage.done for stage in plan(recipe_of(studio.outputs / "first"), studio.outputs / "first"))


def until(ready) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)
