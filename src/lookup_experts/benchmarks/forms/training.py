"""Several small models trained side by side, as `mole train` would train each.

A step of such a model is hundreds of small operations, so on a GPU the whole of it, optimizer
included, is captured as one CUDA graph: what changes from step to step, the batch and the learning
rate, is looked up on the device by a counter that is there as well. Models of one group have a
stream each and overlap. Products are in float32, on a GPU of TF32's precision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.benchmarks.forms.every_id import EveryId
from lookup_experts.training.data import TokenDataset, TokenShards
from lookup_experts.training.order import ShuffledSequences
from lookup_experts.training.recipe import Recipe, TrainingRecipe
from lookup_experts.training.sources import TrainingData

EAGER_STEPS = 3
"""Before a step is captured: libraries allocate and choose in the first ones."""


@dataclass(frozen=True)
class Text:
    """Prepared text on a device."""

    sequences: Tensor
    """int32 [S, T], the training text cut into sequences."""
    held_out: Tensor
    """int64 [H, T]"""
    use: Tensor
    """float64 [V] on the CPU: how often each id is in the training text."""
    data: Any
    """The folder's `TrainingData`."""
    dataset: TokenDataset

    @classmethod
    def load(cls, folder: Any, training: TrainingRecipe, device: torch.device) -> "Text":
        """The text of a folder of `mole prepare`."""
        data = TrainingData([folder])
        held_out = data.held_out(training)
        assert held_out is not None
        shards = TokenShards(folder)
        dataset = TokenDataset(shards, training.context_length)
        whole = len(dataset) * training.context_length
        tokens = torch.from_numpy(shards.window(0, whole).astype(np.int32))
        examples = [held_out[place]["input_ids"] for place in range(len(held_out))]  # type: ignore[arg-type]
        return cls(
            tokens.view(-1, training.context_length).to(device),
            torch.stack(examples).to(device),
            torch.bincount(tokens, minlength=data.vocabulary.vocab_size).double(),
            data,
            dataset,
        )

    def order(self, training: TrainingRecipe) -> Tensor:
        """int64 [steps, sequences of a step]: what `mole train` sees, step by step."""
        shuffled = ShuffledSequences(self.dataset, training.num_sequences, training.seed)
        places = torch.tensor([shuffled.place(number) for number in range(len(shuffled))])
        return places.view(training.num_steps, training.sequences_per_step)


def learning_rates(training: TrainingRecipe) -> Tensor:
    """float32 [steps]: a warm-up, then a cosine, as the Trainer has it."""
    warmup = round(training.warmup_fraction * training.num_steps)
    rates = []
    for step in range(training.num_steps):
        if step < warmup:
            factor = step / max(1, warmup)
        else:
            progress = (step - warmup) / max(1, training.num_steps - warmup)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            factor = training.min_lr_ratio + (1 - training.min_lr_ratio) * cosine
        rates.append(training.learning_rate * max(0.0, factor))
    return torch.tensor(rates)


def forward_nats(model: Any, batch: Tensor) -> Tensor:
    """Nats of each token but the first of sequences [B, T] int64; float32 [B, T - 1]."""
    length = batch.shape[1]
    # In four dimensions it is taken as it is; asking what it holds would make a GPU wait.
    mask = torch.ones(length, length, dtype=torch.bool, device=batch.device).tril()
    hidden = model.base_model(
        input_ids=batch,
        attention_mask=mask.expand(1, 1, length, length),
        position_ids=torch.arange(length, device=batch.device).unsqueeze(0),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1].flatten(0, 1)).float()
    nats = F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
    return nats.view(len(batch), length - 1)


class Trainee:
    """One model under training.

    Args:
        model: on its device.
        recipe: how it is trained; its gradients are never accumulated.
        text: on the same device.
        graph: whether steps are captured, which needs a GPU.
    """

    def __init__(self, model: Any, recipe: Recipe, text: Text, graph: bool) -> None:
        training, device = recipe.training, text.sequences.device
        self.model = model
        self.losses = torch.zeros(training.num_steps, device=device)
        self._sequences = text.sequences
        self._order = text.order(training).to(device)
        self._rates = learning_rates(training).to(device)
        self._clip = training.clip
        self._step_number = torch.zeros(1, dtype=torch.int64, device=device)
        self._rate = torch.zeros((), device=device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            _groups(model, training.weight_decay),
            lr=self._rate,
            betas=training.betas,
            fused=True,
            capturable=device.type == "cuda",
        )
        self._stream = torch.cuda.Stream() if graph else None
        self._graph: Any = None
        self._taken = 0

    def step(self) -> None:
        """The next step; on a GPU it is only begun."""
        if self._stream is None:
            self._take_step()
        else:
            self._begin_step(self._stream)
        self._taken += 1

    def _begin_step(self, stream: Any) -> None:
        if self._taken < EAGER_STEPS:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._take_step()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._take_step()
        with torch.cuda.stream(stream):
            self._graph.replay()

    def _take_step(self) -> None:
        place = self._step_number
        self._rate.copy_(self._rates.index_select(0, place).view(()))
        chosen = self._order.index_select(0, place).view(-1)
        loss = forward_nats(self.model, self._sequences.index_select(0, chosen).long()).mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
        self._optimizer.step()
        self.losses.index_copy_(0, place, loss.detach().view(1))
        place.add_(1)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; embeddings, static rows among them, and norms don't."""
    kept = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p not in kept]
    others = [p for p in model.parameters() if p.ndim < 2 or p in kept]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def train_side_by_side(trainees: Sequence[Trainee]) -> None:
    """All steps of all of them, in turn."""
    for _ in range(len(trainees[0].losses)):
        for trainee in trainees:
            trainee.step()
    if trainees[0].losses.is_cuda:
        torch.cuda.synchronize()


def evaluate_every_id(model: Any) -> None:
    """Let a model in training form evaluate its whole vocabulary; a dense one stays as it is."""
    source = getattr(model, "expert_source", None)
    if source is not None:
        model.set_expert_source(EveryId(source.settings))
