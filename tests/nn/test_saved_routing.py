"""The operator that hands a choice of experts on, under whose name recomputation keeps it."""

import torch
from small_layers import make_moe, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from himoe.nn.saved_routing import saved_routing

IDS, SELECTED = torch.tensor([[3, 0], [1, 2]]), torch.tensor([[True, False], [True, True]])


def test_it_changes_nothing_and_is_a_sound_operator():
    for given, handed_on in zip((IDS, SELECTED), saved_routing(IDS, SELECTED), strict=True):
        assert torch.equal(given, handed_on) and given.data_ptr() != handed_on.data_ptr()
    results = torch.library.opcheck(torch.ops.himoe.saved_routing.default, (IDS, SELECTED))
    assert set(results.values()) == {"SUCCESS"}


def test_every_choice_passes_through_it_with_padding_taken_out():
    class Listen(TorchDispatchMode):
        heard = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            if operator is torch.ops.himoe.saved_routing.default:
                self.heard.append(result)
            return result

    mask = torch.tensor([True, False, True])
    with Listen() as listen:
        _, routing = make_moe("loss_free")(tokens(3), mask)
    ((ids, selected),) = listen.heard
    assert ids is routing.expert_ids and selected is routing.selected
    assert selected.any(-1).tolist() == mask.tolist()
