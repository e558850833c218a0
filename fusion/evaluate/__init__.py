"""How good is a model, and how sure is that: checkable prompts, perplexity, a judge, public benchmarks; tables with intervals.

    models = named(["assets/demo/pivot", "assets/demo/target-qwen"])
    done = finish(by_questions(models, questions(), baseline="pivot"))      # from fusion.demo.questions
    print(done.table.markdown())

torch and transformers are imported when the first model is loaded.
"""

from fusion.evaluate.endpoint import Endpoint
from fusion.evaluate.models import Lent, chosen, named
from fusion.evaluate.questions import (
    JudgeQuestion,
    load_questions,
    questions_from_text,
    with_pasted_references,
    with_references,
)
from fusion.evaluate.radar import figure, radar
from fusion.evaluate.report import Evaluation, document, refuse_existing, write
from fusion.evaluate.runs import by_judge, by_lm_eval, by_perplexity, by_questions
from fusion.evaluate.scores import Scores
from fusion.evaluate.tables import Cell, Row, Table, from_scores
from fusion.evaluate.tasks import Question, of_domains

__all__ = ["Cell", "Endpoint", "Evaluation", "JudgeQuestion", "Lent", "Question", "Row", "Scores", "Table", "by_judge",
           "by_lm_eval", "by_perplexity", "by_questions", "chosen", "document", "figure", "from_scores", "load_questions",
           "named", "of_domains", "questions_from_text", "radar", "refuse_existing", "with_pasted_references",
           "with_references", "write"]
