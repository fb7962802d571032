"""Row energies of tables that are head and embedding at once."""

import pytest
import torch

from bytecap.calibration.collectors import Use
from bytecap.calibration.metric import join

ROWS, COLS, TOKENS = 40, 3, 1000


def uses(seen, predicted):
    """A head with predicted frequencies (rows,), and a lookup of tokens that came up so often (rows,)."""
    eye = torch.eye(COLS, dtype=torch.float64)
    head = Use(eye * 50, predicted * 7, (predicted * 7).sum() / ROWS)
    return head, Use(eye * 200, seen * 0.3, (seen * 0.3).sum())


def steep():
    frequency = torch.arange(1, ROWS + 1, dtype=torch.float64) ** -1.5
    return frequency / frequency.sum() * TOKENS


class TestTiedTables:
    def test_what_came_up_by_chance_counts_less_than_what_is_expected(self):
        seen, expected = steep().round(), steep()
        seen[-2:] = torch.tensor([6.0, 0.0])
        alone, tied = join(uses(seen, expected)[1:], TOKENS), join(uses(seen, expected), TOKENS)
        by_chance, neighbour = tied.rows[-2] / tied.rows[0], tied.rows[-1] / tied.rows[0]
        assert by_chance / neighbour < 0.6 * float(alone.rows[-2] / alone.rows[-1])
        assert by_chance > neighbour

    def test_what_comes_up_often_stays_where_nobody_predicts_it(self):
        seen, expected = steep(), steep()
        seen[-1], expected[-1] = 250.0, 1e-12  # the token in front of every document
        head, lookup = uses(seen, expected)
        head.moment *= 1e-9  # so that the lookup decides
        rows = join((head, lookup), TOKENS).rows
        assert float(rows[-1] / rows[0]) == pytest.approx(250 / float(seen[0]), rel=0.2)

    def test_the_energy_of_the_whole_stays(self):
        head, lookup = uses(steep().round(), steep())
        found, again = join((head, lookup), TOKENS), join((lookup, head), TOKENS)
        alone = [join([u], TOKENS) for u in (head, lookup)]
        unseen = (1 + 0.02 * ROWS / TOKENS) / (1 + 0.5 * ROWS / TOKENS)  # given to every row besides
        torch.testing.assert_close(found.hessian, (alone[0].hessian + alone[1].hessian) * unseen)
        torch.testing.assert_close(found.hessian, again.hessian)
        torch.testing.assert_close(found.rows, again.rows)
        assert float(found.rows.mean()) == pytest.approx(1)

    def test_other_pairs_are_joined_as_they_are(self):
        head, lookup = uses(steep().round(), steep())
        for pair in ((head, head), (lookup, lookup)):
            torch.testing.assert_close(join(pair, TOKENS).rows, join(pair[:1], TOKENS).rows)

    def test_a_lookup_without_energy_is_no_division_by_zero(self):
        head, lookup = uses(torch.zeros(ROWS, dtype=torch.float64), steep())
        assert torch.isfinite(join((head, lookup), TOKENS).rows).all()
