"""Balanced assignment of tokens to experts by auction (Bertsekas and Castanon 1989, for objects of which there are many alike).

Every token without a place bids for one with the expert that is worth most to it at the current prices: so much that the expert would
then be worth `epsilon` less to it than the second best. An expert keeps its highest bids; the lowest of these is its price. Nobody
holds a place that is worth more than `epsilon` less to him than the best one, so the total lies within T * epsilon of the optimum.
A large epsilon ends quickly; its prices are the start for a smaller one.

Letters: T tokens, E experts, U tokens without a place, B holders and bidders of the experts that got a bid.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRECISION = 1e-2  # The last epsilon, as a share of the spread of a token's scores (the authors of BASE take 2e-2).
_FACTOR = 5.0  # By which epsilon falls from one auction to the next.


def fair_shares(score_TE: Tensor) -> Tensor:
    """int64[E]: T / E places for each expert; where that leaves a remainder, one more for those that most tokens score highest."""
    n_tokens, n_experts = score_TE.shape
    wanted_E = torch.bincount(score_TE.argmax(-1), minlength=n_experts) + score_TE.double().softmax(-1).mean(0)  # a share below 1 breaks ties
    share_E = torch.full_like(wanted_E, n_tokens // n_experts, dtype=torch.int64)
    share_E[wanted_E.topk(n_tokens % n_experts).indices] += 1
    return share_E


@torch.no_grad()
def assign(score_TE: Tensor, place_E: Tensor, precision: float = PRECISION) -> Tensor:
    """int64[T]: an expert for every token, `place_E` tokens for each expert, total score within T * precision * spread of the highest.

    `spread` is the largest difference between two scores of one token, after each expert's mean is taken off: that, like anything
    that is the same for all tokens, changes every complete assignment's total alike. Waits for the device at every round of bids.
    Scores that are not finite count as 0: a run that has diverged still ends its step, to be told. Raises ValueError where the
    places are not as many as the tokens.
    """
    if int(place_E.sum()) != len(score_TE):
        raise ValueError(f"{int(place_E.sum())} places for {len(score_TE)} tokens")
    score_TE = score_TE.double().nan_to_num(0.0, 0.0, 0.0)
    score_TE = score_TE - score_TE.mean(0)
    score_TE = score_TE - score_TE.amin(-1, keepdim=True)
    spread = float(score_TE.max()) or 1.0
    price_E = torch.where(place_E > 0, 0.0, torch.inf).to(score_TE)
    epsilon = spread / 4
    while epsilon > precision * spread:
        _, price_E = _auction(score_TE, place_E, price_E, epsilon)
        epsilon /= _FACTOR
    return _auction(score_TE, place_E, price_E, precision * spread)[0]


def _auction(score_TE: Tensor, place_E: Tensor, price_E: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(expert of every token, prices at the end), from empty places at the prices `price_E`."""
    n_tokens, n_experts = score_TE.shape
    expert_T = score_TE.new_full((n_tokens,), n_experts, dtype=torch.int64)
    bid_T = score_TE.new_zeros(n_tokens)
    price_E = price_E.clone()
    loser_U = torch.arange(n_tokens, device=score_TE.device)
    while len(loser_U):
        best_U2 = (score_TE[loser_U] - price_E).topk(min(2, n_experts), dim=-1)
        expert_U = best_U2.indices[:, 0]
        second_U = best_U2.values[:, -1]
        second_U = torch.where(second_U.isfinite(), second_U, best_U2.values[:, 0])  # where one expert alone has places
        expert_T[loser_U] = expert_U
        bid_T[loser_U] = score_TE[loser_U, expert_U] - second_U + epsilon
        # Experts that got no bid keep their holders and prices.
        asked_E = torch.zeros(n_experts + 1, dtype=torch.bool, device=score_TE.device)
        asked_E[expert_U] = True
        bidder_B = asked_E[expert_T].nonzero().squeeze(-1)
        loser_U = bidder_B[_settle(expert_T[bidder_B], bid_T[bidder_B], place_E, price_E)]
        expert_T[loser_U] = n_experts
    return expert_T, price_E


def _settle(expert_B: Tensor, bid_B: Tensor, place_E: Tensor, price_E: Tensor) -> Tensor:
    """Which of these holders and bidders lose: each expert keeps its highest bids. A full one's price becomes the lowest it keeps."""
    by_bid_B = bid_B.argsort(descending=True, stable=True)
    order_B = by_bid_B[expert_B[by_bid_B].argsort(stable=True)]
    sorted_B = expert_B[order_B]
    count_E = torch.bincount(expert_B, minlength=len(place_E))
    start_E = count_E.cumsum(0) - count_E
    rank_B = torch.arange(len(order_B), device=order_B.device) - start_E[sorted_B]
    last_B = rank_B == place_E[sorted_B] - 1
    price_E[sorted_B[last_B]] = bid_B[order_B[last_B]]
    return order_B[rank_B >= place_E[sorted_B]]
