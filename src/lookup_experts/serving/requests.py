"""From a body whose fields are right to the sequences that it asks for."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lookup_experts.serving.adjusting import Adjustment, Penalties
from lookup_experts.serving.constraints import Constraint, Constraints, GrammarError
from lookup_experts.serving.defaults import SamplingDefaults
from lookup_experts.serving.errors import ApiError
from lookup_experts.serving.messages import ChosenTool, Tool
from lookup_experts.serving.prompts import Prompter
from lookup_experts.serving.protocol import ChatBody, CompletionBody, GenerationBody
from lookup_experts.serving.replies import Choice
from lookup_experts.serving.sampling import Chooser
from lookup_experts.serving.sequence import GenerationRequest
from lookup_experts.serving.tool_calls import ToolCallReader, ToolSyntax, grammar_of
from lookup_experts.serving.vocabulary import BytesOf, Vocabulary

Number = TypeVar("Number", int, float)

DEFAULT_COMPLETION_TOKENS = 16
"""Of OpenAI's API."""


@dataclass
class Asked:
    """What a request asks of the engine, and where its answers are gathered."""

    requests: list[GenerationRequest]
    choices: list[Choice]
    bytes_of: BytesOf
    """What a token adds to the text."""


@dataclass(frozen=True)
class RequestMaker:
    """Makes what the engine runs, for one model."""

    prompter: Prompter
    vocabulary: Vocabulary
    constraints: Constraints
    defaults: SamplingDefaults
    end_ids: frozenset[int]
    seconds: float
    """That a request may take."""

    def completion(self, body: CompletionBody, table: str | None = None) -> Asked:
        """The sequences of a completion, with a table of the model's, if it has several.

        Raises:
            ApiError: the model can't do that.
        """
        wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if wanted == 0 and not body.echo:
            raise ApiError(400, "max_tokens can be 0 only with echo.", "max_tokens")
        asked = Asked([], [], self.vocabulary.bytes_of)
        for prompt in body.prompts():
            ids = self.prompter.encode(prompt)
            self.prompter.room_for(ids, wanted)
            text = prompt if isinstance(prompt, str) else None
            for copy in range(body.n or 1):
                place = len(asked.requests)
                request = self._request(body, ids, wanted, place, body.logprobs, None, table)
                choice = Choice(place, len(ids), counts_prompt=copy == 0)
                if body.echo:
                    choice.echo_text = self.prompter.text(ids) if text is None else text
                    choice.echo_ids = ids
                    request.score_prompt = body.logprobs is not None
                asked.requests.append(request)
                asked.choices.append(choice)
        return asked

    def chat(self, body: ChatBody, table: str | None = None) -> Asked:
        """As `completion`, of a conversation."""
        tools = self._shown_tools(body)
        syntax = self._tool_syntax() if body.may_call else None
        ids = self.prompter.encode_chat(body.messages, tools, bool(body.continue_final_message))
        room = self.prompter.room_for(ids, body.most_tokens())
        constraint = self._constraint(body, tools, syntax)
        top = (body.top_logprobs or 0) if body.logprobs else None
        places = range(body.n or 1)
        return Asked(
            [self._request(body, ids, room, place, top, constraint, table) for place in places],
            [
                Choice(
                    place,
                    len(ids),
                    counts_prompt=place == 0,
                    reader=ToolCallReader(syntax) if syntax is not None else None,
                )
                for place in places
            ],
            self._bytes_of(syntax),
        )

    # ------------------------------------------------------------------ tools and forms

    def _shown_tools(self, body: ChatBody) -> Sequence[Tool]:
        """The tools that the model is told of: none that it can't be told of and may not call."""
        if not body.tools or (not body.may_call and self._template_syntax() is None):
            return ()
        return body.tools

    def _template_syntax(self) -> ToolSyntax | None:
        return self.prompter.template(for_tools=True).tool_syntax

    def _tool_syntax(self) -> ToolSyntax:
        syntax = self._template_syntax()
        if syntax is None:
            raise ApiError(
                400,
                "Tools are not supported with this model: its chat template has no place for "
                "them, or writes calls in a form that this server doesn't read. Leave tools out.",
                "tools",
                "no_tools",
            )
        return syntax

    def _constraint(
        self, body: ChatBody, tools: Sequence[Tool], syntax: ToolSyntax | None
    ) -> Constraint | None:
        answer = body.schema_of_answer
        try:
            if syntax is None:
                return None if answer is None else self.constraints.of_schema(answer)
            chosen = body.tool_choice if isinstance(body.tool_choice, ChosenTool) else None
            name = chosen.function.name if chosen is not None else None
            grammar = grammar_of(
                syntax,
                [tool for tool in tools if name in (None, tool.function.name)],
                must_call=name is not None or body.tool_choice == "required",
                many=name is None and body.parallel_tool_calls is not False,
                answer=answer,
                special_ids=self.constraints.special_ids(),
            )
            return self.constraints.of_grammar(grammar)
        except GrammarError as error:
            field = "response_format" if syntax is None else "tools"
            raise ApiError(400, str(error), field) from error

    def _bytes_of(self, syntax: ToolSyntax | None) -> BytesOf:
        """What tokens add to an answer: where tools may be called also the special tokens by
        which calls are known."""
        if syntax is None:
            return self.vocabulary.bytes_of
        written = f"{syntax.opening}{syntax.between or ''}{syntax.closing}"
        names = [name for name in self.vocabulary.special_names if name in written]
        ids = [self.vocabulary.special_id(name) for name in names]
        return self.vocabulary.spelling([one for one in ids if one is not None])

    # ------------------------------------------------------------------ sequences

    def _request(
        self,
        body: GenerationBody,
        ids: list[int],
        max_tokens: int,
        place: int,
        top: int | None,
        constraint: Constraint | None,
        table: str | None,
    ) -> GenerationRequest:
        stops = body.stops()
        ids_of_names = [self.vocabulary.special_id(stop) for stop in stops]
        stop_ids = {*(body.stop_token_ids or ()), *(one for one in ids_of_names if one is not None)}
        least = body.min_tokens or 0
        if least > max_tokens:
            raise ApiError(
                400,
                f"min_tokens is {least}, more than the {max_tokens} tokens that may come.",
                "min_tokens",
            )
        return GenerationRequest(
            ids,
            max_tokens,
            self._chooser(body, ids, place, frozenset(stop_ids), constraint),
            stops,
            frozenset(stop_ids),
            bool(body.ignore_eos),
            least,
            top,
            lookup_details=bool(body.lookup_details),
            deadline=time.monotonic() + self.seconds,
            table=table,
        )

    def _chooser(
        self,
        body: GenerationBody,
        ids: Sequence[int],
        place: int,
        stop_ids: frozenset[int],
        constraint: Constraint | None,
    ) -> Chooser:
        if body.biases:
            self.prompter.check_ids([*body.biases], "logit_bias")
        plain = self.defaults
        adjustment = Adjustment(
            Penalties(
                body.presence_penalty or 0.0,
                body.frequency_penalty or 0.0,
                _given(body.repetition_penalty, plain.repetition_penalty),
            ),
            body.biases,
            ids,
            (self.end_ids | stop_ids) if body.min_tokens else frozenset(),
            body.min_tokens or 0,
            constraint.copy() if constraint is not None else None,
        )
        return Chooser(
            temperature=_given(body.temperature, plain.temperature),
            top_p=_given(body.top_p, plain.top_p),
            top_k=max(0, _given(body.top_k, plain.top_k)),
            min_p=_given(body.min_p, plain.min_p),
            seed=None if body.seed is None else body.seed + place,
            adjustment=adjustment if adjustment else None,
        )


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value
