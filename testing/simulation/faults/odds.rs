//! How often the ordinary accidents happen.

use super::dice::Dice;
use super::trouble::Trouble;

/// How often things go wrong, in ten thousand calls. Each seed has its own mixture.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// An error, and nothing was done.
    pub before: u32,
    /// An error, though it was done.
    pub after: u32,
    /// No answer until the caller's patience ends; done or not.
    pub hang: u32,
    pub crash: u32,
    pub freeze: u32,
    /// A call that takes seconds.
    pub slow: u32,
    /// Of Glance's tasks.
    pub task_failure: u32,
    /// Of Glance's tasks: never goes on.
    pub task_stuck: u32,
    /// Of the OSDs' fill.
    pub unsupported: u32,
    /// A copy that went wrong and says nothing.
    pub spoiled: u32,
    /// A call whose caller gave it up: it goes on.
    pub lasting: u32,
    /// The time of accidents is over.
    pub calm: bool,
}

impl Faults {
    fn of(dice: &mut Dice) -> Self {
        let mut some = |small: u32, large: u32| match dice.below(4) {
            0 | 1 => 0,
            2 => small,
            _ => large,
        };
        Self {
            before: some(50, 400),
            after: some(50, 400),
            hang: some(10, 60),
            crash: some(40, 250),
            freeze: some(30, 200),
            slow: some(50, 300),
            task_failure: some(500, 2500),
            task_stuck: some(0, 800),
            unsupported: some(0, 4000),
            spoiled: some(0, 1000),
            lasting: some(3000, 9000),
            calm: false,
        }
    }

    /// How often things go wrong in a world with this trouble.
    pub fn with(dice: &mut Dice, trouble: &[Trouble]) -> Self {
        let faults = Self::of(dice);
        // mostly without other faults, so that the effect of the hanging call shows
        let calm = trouble.contains(&Trouble::HangingCalls) && dice.percent(60);
        let lasting = if trouble.contains(&Trouble::LastingCalls) { faults.lasting } else { 0 };
        if calm { Self { lasting, ..Self::default() } } else { Self { lasting, ..faults } }
    }
}
