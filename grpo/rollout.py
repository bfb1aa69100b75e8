"""Groups of completions, and the packed rows on which they are scored and trained.

A group is G completions of one prompt. A pack is a few rows; a row is a prompt once, followed by
completions of it, so that neither the prompt nor its image is computed G times. No reward and no
advantage is known here.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.generate import Sampling, generate
from models.processor import Prompt
from models.qwen_vl import QwenVL


@dataclass(frozen=True)
class Group:
    """One prompt and its completions.

    completion_ids: G lists of token ids, the stop token included where one was drawn.
    sampling_logps: G tensors (C,) float32, nats, as drawn. truncated: G flags, True where the
    length limit and not a stop token ended the completion.
    """

    prompt: Prompt
    completion_ids: list[list[int]]
    sampling_logps: list[Tensor]
    truncated: list[bool]


@dataclass(frozen=True)
class Pack:
    """Rows of [prompt | c1 | ... | cn] end to end, T tokens of which C are completion tokens.

    input_ids: (T,) int64; position_ids: (3, T) int64; rows: lengths [P, C1, ..., Cn] per row;
    prompts: one per row. predicts: (C,) int64, the packed index whose hidden state predicts each
    completion token; targets: (C,) int64, those tokens. completions: (group, member) of each
    completion in order; lengths: their lengths.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: list[tuple[int, ...]]
    prompts: list[Prompt]
    predicts: Tensor
    targets: Tensor
    completions: list[tuple[int, int]]
    lengths: list[int]

    def per_token(self, table: Tensor) -> Tensor:
        """(groups, members) values of completions -> (C,), each repeated over its tokens."""
        index, member = torch.tensor(self.completions, dtype=torch.int64).view(-1, 2).T
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return table[index, member].repeat_interleave(lengths)

    def completion_at(self, token: int) -> tuple[int, int]:
        """(group, member) of the completion that the packed completion token `token` is in."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return self.completions[int(torch.searchsorted(ends, token, right=True))]

    def sampling_logps(self, groups: Sequence[Group]) -> Tensor:
        """The log-probs under which the completions were drawn, (C,) float32."""
        found = [groups[i].sampling_logps[member] for i, member in self.completions]
        return torch.cat(found) if found else torch.zeros(0)


def uniform_numbers(seed: int, step: int, prompt: int, sample: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1), the random numbers of one sample.

    They depend on these four integers alone, so a run does not change with the batch's composition
    or the number of ranks.
    """
    name = f"{seed}/{step}/{prompt}/{sample}".encode()
    state = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
    generator = torch.Generator().manual_seed(state)
    return torch.rand(count, dtype=torch.float64, generator=generator)


def sample_groups(
    model: QwenVL,
    prompts: Sequence[Prompt],
    num_generations: int,
    sampling: Sampling,
    seed: int,
    step: int,
    prompt_indices: Sequence[int],
) -> list[Group]:
    """`num_generations` completions of each prompt, drawn from the model as it stands.

    prompt_indices: each prompt's place in the step's whole batch, over all ranks; with seed, step
    and the sample's number in its group it fixes the sample's random numbers.
    """
    if not prompts:
        return []
    uniforms = torch.stack(
        [
            uniform_numbers(seed, step, index, member, sampling.max_completion_length)
            for index in prompt_indices
            for member in range(num_generations)
        ]
    )
    ids, logps = generate(model, prompts, num_generations, sampling, uniforms)
    stop = set(sampling.stop_ids)
    groups = []
    for start, prompt in zip(range(0, len(ids), num_generations), prompts, strict=True):
        part = slice(start, start + num_generations)
        truncated = [completion[-1] not in stop for completion in ids[part]]
        groups.append(Group(prompt, ids[part], logps[part], truncated))
    return groups


def make_packs(groups: Sequence[Group], tokens_per_pack: int) -> list[Pack]:
    """Cuts the groups into packs of at most `tokens_per_pack` tokens, in order.

    A group that does not fit is split, its prompt repeated in each part; a single completion that
    does not fit gets a pack of its own.
    """
    packs: list[list[tuple[int, list[int]]]] = [[]]
    used = 0
    for index, group in enumerate(groups):
        members: list[int] | None = None
        for member, completion in enumerate(group.completion_ids):
            cost = len(completion) + (len(group.prompt) if members is None else 0)
            if used + cost > tokens_per_pack and packs[-1]:
                packs.append([])
                used, members = 0, None
                cost = len(completion) + len(group.prompt)
            if members is None:
                members = []
                packs[-1].append((index, members))
            members.append(member)
            used += cost
    return [_pack(groups, rows) for rows in packs if rows]


def _pack(groups: Sequence[Group], rows: list[tuple[int, list[int]]]) -> Pack:
    ids, positions, lengths, predicts = [], [], [], []
    start = 0
    for index, members in rows:
        prompt = groups[index].prompt
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        row = [len(prompt)]
        last = start + len(prompt) - 1
        start += len(prompt)
        for member in members:
            completion = torch.tensor(groups[index].completion_ids[member])
            steps = torch.arange(len(completion))
            ids.append(completion)
            positions.append((prompt.next_position + steps).expand(3, -1))
            # the prompt's last token predicts the first, each token the one after it
            predicts.append(torch.cat((torch.tensor([last]), start + steps[:-1])))
            row.append(len(completion))
            start += len(completion)
        lengths.append(tuple(row))
    predicts = torch.cat(predicts)
    return Pack(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        rows=lengths,
        prompts=[groups[index].prompt for index, _ in rows],
        predicts=predicts,
        targets=torch.cat(
            [torch.tensor(groups[i].completion_ids[m]) for i, members in rows for m in members]
        ),
        completions=[(index, member) for index, members in rows for member in members],
        lengths=[length for row in lengths for length in row[1:]],
    )


def filler() -> Pack:
    """A pack of one prompt token and no completion: its loss and gradients are exactly 0.

    A rank with fewer packs than another takes part with these in the layers' gathering.
    """
    none = torch.zeros(0, dtype=torch.int64)
    grid = torch.zeros(0, 3, dtype=torch.int64)
    prompt = Prompt(
        torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), 1, none, grid, ()
    )
    return Pack(prompt.input_ids, prompt.position_ids, [(1,)], [prompt], none, none, [], [])
