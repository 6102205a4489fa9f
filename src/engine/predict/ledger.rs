//! What each rule of a grid cost, beside the default: which of them surely saved.

use super::ranking::Ranking;

/// Blocks before a saving is trusted.
const BLOCKS_MIN: f64 = 16.0;
/// Share by which another rule must have cost less than the default to replace it.
const GAIN_MIN: f64 = 0.001;

/// Largest share of choices in which a rule may have done harm and still replace the default: who is sent on a
/// slower detour notices, who is not sent on a faster one does not. What was harmless so far is partly luck: on
/// the Seattle trace rules chosen with 0.03 did harm in 4.0 % of the choices after.
const HARM_MAX: f64 = 0.02;

/// What a rule paid for a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Paid {
    /// What the route that it took cost.
    pub cost: f64,
    /// Whether that was much more than staying would have.
    pub harm: bool,
}

/// What a rule cost beyond the default.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// Choices in which it did harm.
    harmed: u32,
    /// In this block, in all blocks before, and the sum of squares over blocks.
    block: f64,
    sum: f64,
    squares: f64,
}

/// The accounts of all rules over choices in order of time. Choices made close together share what
/// happened then, so that savings are counted by blocks.
#[derive(Clone, Debug)]
pub struct Ledger {
    rules: Vec<(Ranking, Account)>,
    default: usize,
    default_cost: f64,
    choices: u32,
    blocks: f64,
    block_choices: u32,
    in_block: u32,
}

impl Ledger {
    /// Empty accounts, with `block_choices` choices a block; the default is added to the rules
    /// when it is not among them.
    pub fn new(mut rules: Vec<Ranking>, default: Ranking, block_choices: u32) -> Self {
        let position = rules.iter().position(|rule| *rule == default);
        let default = position.unwrap_or_else(|| {
            rules.push(default);
            rules.len() - 1
        });
        let rules = rules.into_iter().map(|rule| (rule, Account::default())).collect();
        Self {
            rules,
            default,
            default_cost: 0.0,
            choices: 0,
            blocks: 0.0,
            block_choices,
            in_block: 0,
        }
    }

    /// Empty accounts of the same rules, with another default.
    pub fn beside(&self, default: Ranking) -> Self {
        Self::new(self.rules().copied().collect(), default, self.block_choices)
    }

    /// The rule that all are compared with.
    pub fn default_rule(&self) -> Ranking {
        self.rules[self.default].0
    }

    /// The rules, in the order of their positions.
    pub fn rules(&self) -> impl Iterator<Item = &Ranking> {
        self.rules.iter().map(|(rule, _)| rule)
    }

    /// A choice became known: `paid` says what each rule, with its position, paid.
    pub fn add(&mut self, paid: impl Fn(usize, &Ranking) -> Paid) {
        let default_cost = paid(self.default, &self.rules[self.default].0).cost;
        for (index, (rule, account)) in self.rules.iter_mut().enumerate() {
            let Paid { cost, harm } = paid(index, rule);
            account.block += cost - default_cost;
            account.harmed += u32::from(harm);
        }
        self.default_cost += default_cost;
        self.choices += 1;
        self.in_block += 1;
    }

    /// The choices of one moment are complete; a block ends with a moment, never within one.
    pub fn end_round(&mut self) {
        if self.in_block < self.block_choices {
            return;
        }
        for (_, account) in &mut self.rules {
            account.sum += account.block;
            account.squares += account.block * account.block;
            account.block = 0.0;
        }
        self.blocks += 1.0;
        self.in_block = 0;
    }

    /// The rule that surely saved most against the default, once `choices_min` choices in enough
    /// blocks were seen; else the default. Sure is a saving of so many standard errors: the best of
    /// many is luck otherwise.
    pub fn best(&self, choices_min: u32, standard_errors: f64) -> Ranking {
        let default = self.default_rule();
        if !self.has_seen(choices_min) {
            return default;
        }
        let bound = |account: &Account| {
            let variance = (account.squares - account.sum * account.sum / self.blocks).max(0.0);
            account.sum + standard_errors * variance.sqrt()
        };
        let harmed_max = HARM_MAX * f64::from(self.choices);
        let harmless = self.rules.iter().filter(|(_, a)| f64::from(a.harmed) <= harmed_max);
        let bounds = harmless.map(|(rule, account)| (rule, bound(account)));
        match bounds.min_by(|(_, a), (_, b)| a.total_cmp(b)) {
            Some((rule, least)) if least < -GAIN_MIN * self.default_cost => *rule,
            _ => default,
        }
    }

    /// Whether `choices_min` choices in enough blocks were seen to trust a saving.
    pub fn has_seen(&self, choices_min: u32) -> bool {
        self.choices >= choices_min && self.blocks >= BLOCKS_MIN
    }

    /// Choices seen.
    pub fn choices(&self) -> u32 {
        self.choices
    }

    /// Each rule and what its choices cost in all, in the order of their positions.
    pub fn costs(&self) -> impl Iterator<Item = (&Ranking, f64)> {
        let cost = |account: &Account| self.default_cost + account.sum + account.block;
        self.rules.iter().map(move |(rule, account)| (rule, cost(account)))
    }

    /// Mean cost of a choice by this rule; `None` when it is no rule of this ledger, or nothing
    /// was seen.
    pub fn mean_cost(&self, rule: &Ranking) -> Option<f64> {
        let (_, cost) = self.costs().find(|(known, _)| *known == rule)?;
        (self.choices > 0).then(|| cost / f64::from(self.choices))
    }
}
