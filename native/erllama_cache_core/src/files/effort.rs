//! How much of the machine a save may take.

use std::thread;
use std::time::Duration;

use super::sys;

/// How much of the machine a save may take while it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Another thread takes its share of the work.
    Helped,
    /// One thread, for this percentage of its time; 100 and more is all of it. It rests after each
    /// piece: a process on the other half of the same core is slowed down for as long as this one
    /// works.
    Share(u8),
}

impl Effort {
    /// Whether no other thread helps.
    pub(super) fn is_alone(self) -> bool {
        self != Effort::Helped
    }

    /// Does a piece of work, and rests for as long as the share demands.
    pub(super) fn paced<T>(self, work: impl FnOnce() -> T) -> T {
        match self {
            Effort::Share(percent) if percent < 100 => {
                let begun = sys::thread_time();
                let result = work();
                // Only the processor's time: a disk that is waited for is a rest already.
                thread::sleep(rest(sys::thread_time().saturating_sub(begun), percent));
                result
            }
            Effort::Helped | Effort::Share(_) => work(),
        }
    }
}

/// How long to rest after so much work.
fn rest(work: Duration, percent: u8) -> Duration {
    let percent = u32::from(percent.clamp(1, 100));
    work * (100 - percent) / percent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_what_work_and_rest_take_together() {
        let work = Duration::from_millis(30);
        for (percent, whole) in [(100, 30), (50, 60), (30, 100), (10, 300)] {
            assert_eq!(
                work + rest(work, percent),
                Duration::from_millis(whole),
                "{percent}"
            );
        }
        // Nobody rests for ever.
        assert_eq!(rest(work, 0), rest(work, 1));
    }

    #[test]
    fn the_result_of_a_piece_comes_back() {
        for effort in [Effort::Helped, Effort::Share(100), Effort::Share(50)] {
            assert_eq!(effort.paced(|| 7), 7);
        }
    }
}
