"""`{"topic", "turns": [...]}`: a dialogue as a list of texts, the user's first, in turn.

The topic, where there is one, is told to the model as the system message. A record that cannot be used is returned as a
Fault with its reason, which is counted; `to_conversation` counts every field, so that none is lost in silence.
"""

from lumina.chat import Message
from lumina.data.formats import DataFormat, Fault, Vocabulary, has, to_conversation

RECORD = Vocabulary("turns", frozenset({"topic", "turns"}))


def from_turns(record, tally):
    turns = record["turns"]
    if type(turns) is not list or not all(type(text) is str for text in turns):
        return Fault("wrong type", "`turns` is to be a list of texts")
    messages = [Message("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(turns)]
    if isinstance(record.get("topic"), str):
        messages.insert(0, Message("system", f"Topic: {record['topic']}"))
    return to_conversation(record, messages, tally, RECORD)


FORMAT = DataFormat("turns", from_turns, recognise=((15, has("turns")),), required=has("turns"))
