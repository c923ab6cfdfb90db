"""A sound selector, and one broken in each way that the conformance suite must catch, with the words that name it."""

import torch

E, K = 8, 2


def sound(scores, context):
    expert_ids = scores.topk(K, dim=-1).indices
    return expert_ids, torch.ones_like(expert_ids, dtype=torch.bool)


def gives_ids_alone(scores, context):
    return sound(scores, context)[0]


def forgets_a_token(scores, context):
    return tuple(part[:-1] for part in sound(scores, context))


def selects_per_token(scores, context):
    return sound(scores, context)[0], torch.ones(len(scores), dtype=torch.bool)


def has_no_place(scores, context):
    return tuple(part[:, :0] for part in sound(scores, context))


def gives_int32(scores, context):
    expert_ids, selected = sound(scores, context)
    return expert_ids.int(), selected


def selects_with_floats(scores, context):
    expert_ids, selected = sound(scores, context)
    return expert_ids, selected.float()


def counts_from_one(scores, context):
    expert_ids, selected = sound(scores, context)
    return expert_ids + 1, selected


def marks_unused_with_minus_one(scores, context):
    expert_ids, _ = sound(scores, context)
    used = torch.arange(K) == 0
    return expert_ids.where(used, -1), used.expand(len(scores), K)


def takes_the_best_twice(scores, context):
    best = scores.argmax(-1, keepdim=True)
    return best.expand(-1, K), torch.ones(len(scores), K, dtype=torch.bool)


def repeats_where_scores_are_alike(scores, context):
    expert_ids, selected = sound(scores, context)
    alike = (scores.amax(-1) == scores.amin(-1))[:, None]
    return torch.zeros_like(expert_ids).where(alike, expert_ids), selected


def selects_nothing(scores, context):
    return sound(scores, context)[0], torch.zeros(len(scores), K, dtype=torch.bool)


def selects_nothing_in_eval(scores, context):
    expert_ids, selected = sound(scores, context)
    return expert_ids, selected & context.training


def fails_on_no_token(scores, context):
    return sound(scores - scores.max(), context)


def has_a_place_per_token(scores, context):
    expert_ids = scores.topk(min(max(len(scores), 1), E), dim=-1).indices
    return expert_ids, torch.ones_like(expert_ids, dtype=torch.bool)


def overflows(scores, context):
    expert_ids, selected = sound(scores, context)
    return (expert_ids + (scores.square().sum(-1, keepdim=True).isinf()) * E), selected


def draws(scores, context):
    return sound(scores * torch.rand(scores.shape), context)


def draws_in_eval(scores, context):
    return sound(scores if context.training else scores * torch.rand(scores.shape), context)


def draws_in_eval_too(scores, context):
    return draws(scores, context)


draws_in_eval_too.random = True


def looks_ahead_and_draws(scores, context):
    first = torch.rand(E) if context.training else torch.zeros(E)
    real = scores if context.mask is None else scores.where(context.mask[:, None], 0)
    return sound(scores + first - (real.sum(0) if context.training else 0), context)


looks_ahead_and_draws.random = True


def changes_its_scores(scores, context):
    return sound(scores.detach().mul_(2), context)


def looks_at_gradients(scores, context):
    return sound(scores if torch.is_grad_enabled() else -scores, context)


def counts_padding(scores, context):
    turn = torch.arange(len(scores))[:, None] * K + torch.arange(K)
    return turn % E, torch.ones(len(scores), K, dtype=torch.bool)


def compares_with_padding(scores, context):
    return sound(scores / scores.sum(0, keepdim=True), context)


compares_with_padding.causal = False


def compares_with_padding_in_training(scores, context):
    return sound(scores / scores.sum(0, keepdim=True) if context.training else scores, context)


compares_with_padding_in_training.causal = False


def looks_ahead(scores, context):
    real = scores if context.mask is None else scores.where(context.mask[:, None], 0)
    return sound(scores - real.sum(0), context)


def looks_ahead_in_training(scores, context):
    return looks_ahead(scores, context) if context.training else sound(scores, context)


def looks_at_the_last_word(scores, context):
    ids = context.token_ids if context.mask is None else context.token_ids.where(context.mask, -1)
    last = ids.amax() if len(scores) else 0
    choice = (last + torch.arange(K)) % E
    return choice.expand(len(scores), K), torch.ones(len(scores), K, dtype=torch.bool)


def only_says_it_balances(scores, context):
    return sound(scores, context)


only_says_it_balances.balances_load = True


def wants_less_than_it_takes(scores, context):
    return sound(scores, context)


wants_less_than_it_takes.wanted = lambda scores, context: scores == scores.amax(-1, keepdim=True)


def leaves_out_what_it_wants(scores, context):
    expert_ids = scores.topk(E, dim=-1).indices
    return expert_ids, (torch.arange(E) < K).expand(len(scores), E)


leaves_out_what_it_wants.wanted = lambda scores, context: scores >= scores.sort(-1).values[:, -3:-2]


def reads_back(scores, context):
    k = K if scores.sum().item() > -1e30 else 1
    return sound(scores, context) if k == K else (None, None)


def differs_when_compiled(scores, context):
    return sound(-scores if torch.compiler.is_compiling() else scores, context)


BROKEN = {
    gives_ids_alone: "must return (expert_ids, selected)",
    forgets_a_token: "expert_ids is (22, 2) and selected (22, 2), both must be (23, K)",
    selects_per_token: "expert_ids is (23, 2) and selected (23,)",
    has_no_place: "K ≥ 1",
    gives_int32: "expert_ids is torch.int32",
    selects_with_floats: "selected torch.float32",
    counts_from_one: "an id is not between 0 and 7",
    marks_unused_with_minus_one: "an id is not between 0 and 7 (unused places count too)",
    takes_the_best_twice: "a token has the same expert twice",
    repeats_where_scores_are_alike: "equal scores: a token has the same expert twice",
    selects_nothing: "training: selects no expert for any token",
    selects_nothing_in_eval: "eval: selects no expert for any token",
    fails_on_no_token: "0 tokens, training: fails with RuntimeError",
    has_a_place_per_token: "the number of places changes with the tokens",
    overflows: "huge scores: an id is not between 0 and 7",
    draws: "the same scores give another choice the second time",
    draws_in_eval: "the same scores give another choice the second time",
    draws_in_eval_too: "the same scores give another choice the second time",
    looks_ahead_and_draws: "later tokens change the experts of earlier ones",
    changes_its_scores: "changed its scores in place",
    looks_at_gradients: "chooses otherwise where gradients are off",
    counts_padding: "padding changed the choice of real tokens",
    compares_with_padding: "padding changed the choice of real tokens",
    compares_with_padding_in_training: "padding changed the choice of real tokens",
    looks_ahead: "later tokens change the experts of earlier ones",
    looks_ahead_in_training: "later tokens change the experts of earlier ones",
    looks_at_the_last_word: "later tokens change the experts of earlier ones",
    only_says_it_balances: "balances_load = True, but MaxVio is",
    wants_less_than_it_takes: "selected an expert that wanted() does not name",
    leaves_out_what_it_wants: "leaves out some that wanted() names",
    reads_back: "does not compile as one graph",
    differs_when_compiled: "chooses otherwise when compiled",
}
