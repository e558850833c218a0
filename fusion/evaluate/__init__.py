"""How good is a model, and how sure is that: checkable prompts, perplexity, a judge, public benchmarks; tables with intervals.

    models = named(["assets/demo/pivot", "assets/demo/target-qwen"])
    scores, answers = finish(measure(models, questions))           # fusion.demo.questions has some
    print(from_scores(scores, baseline="pivot").markdown())

torch and transformers are imported when the first model is loaded.
"""

from fusion.evaluate.models import chosen, named
from fusion.evaluate.radar import figure, radar
from fusion.evaluate.report import Evaluation, refuse_existing, write
from fusion.evaluate.scores import Scores
from fusion.evaluate.tables import Cell, Row, Table, from_scores
from fusion.evaluate.tasks import Question, measure

__all__ = ["Cell", "Evaluation", "Question", "Row", "Scores", "Table", "chosen", "figure", "from_scores", "measure", "named",
           "radar", "refuse_existing", "write"]
