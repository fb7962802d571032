"""Reduce a chat template to the texts between messages, for a page that cannot run the template.

A template is a program (Jinja). For a conversation of user and assistant in turn almost all templates write the same
three texts: in front of the first message, between a question and its answer, and behind an answer. They are read off
what the template makes of words that occur nowhere else, and held against other conversations, so a page that joins
texts gives what the template would. Omitted: system texts, tools, and templates that are not of this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from bytecap.errors import ArtifactError
from bytecap.model.tokenization import is_there, read_tokenizer
from bytecap.pipeline.chat_templates import conversations, special_tokens, template_of

_MOST = 20_000  # characters of all texts: a page is no place for more
_WORDS = ("qvxalpha", "zwkbeta", "jqxgamma", "vkzdelta", "xqjepsilon")


@dataclass(frozen=True)
class ChatForm:
    """The texts around the messages of a conversation.

    Attributes:
        before: in front of the first message.
        asked: behind what a user says, up to where the model begins to speak.
        answered: behind what the model has said, up to the next message.
        control: tokens that end texts or begin messages, which no message may hold.
    """

    before: str
    asked: str
    answered: str
    control: tuple[str, ...]

    def text(self, messages: list[dict[str, str]]) -> str:
        """Return what the template makes of messages, a user's first and last.

        >>> ChatForm("<u>", "<a>", "<u>", ()).text([{"content": "Hi"}, {"content": "Ho"}, {"content": "So"}])
        '<u>Hi<a>Ho<u>So<a>'
        """
        ends = (self.asked, self.answered)
        return self.before + "".join(m["content"] + ends[i % 2] for i, m in enumerate(messages))

    def as_dict(self) -> dict[str, object]:
        """Return the form as JSON holds it."""
        return asdict(self)


def chat_form(files: Mapping[str, bytes], name: str) -> ChatForm | None:
    """Return the form of a model's conversations; None if it has no template.

    Args:
        files: side files of the model.
        name: of the model, for messages.

    Raises:
        ArtifactError: the template fails, or is not of this form.
    """
    if template_of(files) is None or not is_there(files):
        return None
    other = ArtifactError(f"the chat template of {name} does more than join texts around messages")
    talk = _talk(_WORDS)
    talks = [talk[:3], talk[:1], talk, _talk(("Yes?", "no.", "A b\nc", "1", "ß"))]
    written = conversations(files, name, talks)
    before, *rest = _split(written[0], _WORDS[:3], other)
    form = ChatForm(before, rest[0], rest[1], _control(files, before + "".join(rest)))
    if rest[2] != form.asked or len(before + "".join(rest)) > _MOST:
        raise other
    if [form.text(said) for said in talks] != written:
        raise other
    return form


def _control(files: Mapping[str, bytes], text: str) -> tuple[str, ...]:
    """Return the special tokens of a template's texts, and those that end and begin texts."""
    added = read_tokenizer(files).get_added_tokens_decoder().values()
    found = {t.content for t in added if t.special and t.content in text}
    return tuple(sorted(t for t in found | set(special_tokens(files).values()) if t.strip()))


def _talk(words: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(words)]


def _split(text: str, words: tuple[str, ...], other: ArtifactError) -> list[str]:
    """Return the texts between words, each of which occurs once."""
    found = []
    for word in words:
        part, there, text = text.partition(word)
        if not there or word in text:
            raise other
        found.append(part)
    return [*found, text]
