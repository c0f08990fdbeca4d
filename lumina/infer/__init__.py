"""Using a trained model: load it, generate, talk to it, measure it, import and export it.

Handed out as rooms of their own: `serve` (needs the extra of that name) and `evaluation`, whose `tasks` needs the extra
`tasks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.infer.evaluation.loss import Evaluation, evaluate, evaluation_table, read_conversations
    from lumina.infer.generation.batch import Sequence, SequenceBatch, Token
    from lumina.infer.generation.generate import Answer, generate, stream, stream_answer, stream_answers
    from lumina.infer.generation.sampling import Sampling, forbidden_tokens
    from lumina.infer.hf.exporting import Exported, export
    from lumina.infer.hf.importing import IMPORT_RECORD, import_hf
    from lumina.infer.hf.paths import check_new_folder, check_source, parse_size
    from lumina.infer.hf.vocabulary import find_template, stock_template
    from lumina.infer.loading import Loaded, choose_dtype, find_checkpoint, load, read_config, tokenizer_folder
    from lumina.infer.records import message_of, read_tools, record_of, tool_texts
    from lumina.infer.repl import Chat, converse

__getattr__ = names_of(
    __name__,
    {
        "Answer": "generation.generate",
        "SequenceBatch": "generation.batch",
        "Chat": "repl",
        "Evaluation": "evaluation.loss",
        "Exported": "hf.exporting",
        "IMPORT_RECORD": "hf.importing",
        "Loaded": "loading",
        "Sampling": "generation.sampling",
        "Sequence": "generation.batch",
        "Token": "generation.batch",
        "check_new_folder": "hf.paths",
        "check_source": "hf.paths",
        "choose_dtype": "loading",
        "converse": "repl",
        "evaluate": "evaluation.loss",
        "evaluation_table": "evaluation.loss",
        "export": "hf.exporting",
        "find_checkpoint": "loading",
        "find_template": "hf.vocabulary",
        "forbidden_tokens": "generation.sampling",
        "generate": "generation.generate",
        "import_hf": "hf.importing",
        "load": "loading",
        "message_of": "records",
        "parse_size": "hf.paths",
        "read_config": "loading",
        "read_conversations": "evaluation.loss",
        "read_tools": "records",
        "record_of": "records",
        "stock_template": "hf.vocabulary",
        "stream": "generation.generate",
        "stream_answer": "generation.generate",
        "stream_answers": "generation.generate",
        "tokenizer_folder": "loading",
        "tool_texts": "records",
    },
)

__all__ = [
    "IMPORT_RECORD",
    "Answer",
    "Chat",
    "Evaluation",
    "Exported",
    "Loaded",
    "Sampling",
    "Sequence",
    "SequenceBatch",
    "Token",
    "check_new_folder",
    "check_source",
    "choose_dtype",
    "converse",
    "evaluate",
    "evaluation",
    "evaluation_table",
    "export",
    "find_checkpoint",
    "find_template",
    "forbidden_tokens",
    "generate",
    "import_hf",
    "load",
    "message_of",
    "parse_size",
    "read_config",
    "read_conversations",
    "read_tools",
    "record_of",
    "serve",
    "stock_template",
    "stream",
    "stream_answer",
    "stream_answers",
    "tokenizer_folder",
    "tool_texts",
]
