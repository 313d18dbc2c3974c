"""What requests may say: OpenAI's fields as far as they are served, every one of them checked."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from uniql_jax.server.errors import ApiError

M = TypeVar("M", bound=BaseModel)
MAX_STOPS = 4
MAX_CHOICES = 16
UNION_MEMBERS = ("constrained-", "list[", "function-")
"""How pydantic names the kinds that a field may be of; no part of what a client sent."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=2**24)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Generation(_Body):
    """What both calls share. Fields whose only harmless value is the default are checked to have it."""

    model: Annotated[str, Field(max_length=200)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else list(value or [])
        if len(stops) > MAX_STOPS or any(not 1 <= len(stop) <= 1000 for stop in stops):
            raise ValueError(f"at most {MAX_STOPS} texts of 1 to 1000 characters")
        return stops

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _unserved(cls, value: Any) -> None:
        if value:
            raise ValueError("is not supported")


class Completion(Generation):
    """Body of /v1/completions."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @field_validator("prompt")
    @classmethod
    def _some_prompts(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("is empty")
        if isinstance(value, list) and not isinstance(value[0], int) and len(value) > MAX_CHOICES:
            raise ValueError(f"holds more than {MAX_CHOICES} prompts")
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One prompt an entry."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item,return-value]


class Part(_Body):
    """A part of a message; text only."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None


class Setting(_Body):
    """Body of /admin/rate: a rate, or a memory budget."""

    rate: Annotated[float, Field(ge=0, le=0.35)] | None = None
    memory_budget: Annotated[str, Field(max_length=40)] | Annotated[int, Field(ge=1)] | None = None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers differ in which of two they take
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"it has the field {twice[:60]!r} twice")
    return found


def parse(model: type[M], body: bytes) -> M:
    """A body as one of the classes above.

    Raises:
        ApiError: it is no JSON, or not what the class takes; says which field is wrong.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_object)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ApiError(400, f"the body holds U+{half:04X}, half of a surrogate pair", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the body is no JSON: {what}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = [str(part)[:60] for part in first["loc"] if not str(part).startswith(UNION_MEMBERS)]
        said = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{'.'.join(where) or 'body'}: {said}", param=where[0] if where else None) from None


def finite(value: float) -> float | None:
    """A log-probability as JSON can hold it."""
    return value if math.isfinite(value) else None
