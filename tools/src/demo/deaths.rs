//! Guests that end, and guests that stand still for longer than their term.

use super::proto::{Answer, Order};
use super::scenario::Scene;
use super::stage::{ask_all, wait_until};
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

impl Scene<'_> {
    /// A guest ends at once.
    pub fn killed(&mut self) -> Result<()> {
        let victim = self.guests.pop().context("a guest to kill")?;
        let name = victim.part().name.clone();
        let had = self.grants_of(&name)?.unwrap_or(0);
        // With what the command takes.
        let begin = Instant::now();
        victim.kill()?;
        let gone = wait_until(self.scale.soon(), || Ok(self.grants_of(&name)?.is_none()))?;
        let gone = gone.map(|_| begin.elapsed());
        let (topic, free) = match self.hypervisor {
            true => ("destroyed", "session over"),
            false => ("kill -9", "domid free"),
        };
        self.report.line(
            topic,
            gone.is_some() && had > 0,
            format!(
                "{name}: its {had} grants revoked and its {free} {}",
                gone.map_or(
                    format!("NOT within {} s", self.scale.soon().as_secs()),
                    |took| format!("after {:.0} ms", took.as_secs_f64() * 1e3)
                ),
            ),
        );
        Ok(())
    }

    /// A guest is stopped past its term.
    pub fn stopped(&mut self) -> Result<()> {
        let mut sleeper = self.guests.pop().context("a guest to stop")?;
        let name = sleeper.part().name.clone();
        let had = self.grants_of(&name)?.unwrap_or(0);
        sleeper.stop()?;
        let limit = Duration::from_millis(u64::from(self.scale.lease_ttl_ms) * 3);
        let gone = wait_until(limit, || Ok(self.grants_of(&name)?.is_none()))?;
        sleeper.resume()?;
        let refused = matches!(sleeper.ask(&self.changed_page())?, Answer::Refused { .. });
        self.report.line(
            "stopped",
            gone.is_some() && refused && had > 0,
            format!(
                "{name}: fenced {} (lease {:.1} s), its {had} grants drained; resumed, its old pages are {}",
                gone.map_or("NOT in time".into(), |took| format!("after {:.1} s", took.as_secs_f64())),
                f64::from(self.scale.lease_ttl_ms) / 1e3,
                if refused { "refused (SIGBUS)" } else { "STILL READABLE" },
            ),
        );
        Ok(())
    }

    /// Reads a page of the file that was changed on the host.
    fn changed_page(&self) -> Order {
        Order::Read {
            mapping: self.files.len(),
            page: 0,
        }
    }

    /// A guest is paused past its term: nothing can be taken from it, so that its frames rest until it
    /// lets go of them.
    pub fn paused(&mut self) -> Result<()> {
        let mut sleeper = self.guests.pop().context("a guest to pause")?;
        let name = sleeper.part().name.clone();
        let had = self.grants_of(&name)?.unwrap_or(0);
        let before = self.stats()?.frames_quarantined;
        sleeper.stop()?;
        let limit = Duration::from_millis(u64::from(self.scale.lease_ttl_ms) * 3);
        let gone = wait_until(limit, || Ok(self.grants_of(&name)?.is_none()))?;
        // The others let go of their part until the deadline; what is mapped then is in quarantine.
        let deadline = Duration::from_millis(self.scale.lease_ttl_ms.into());
        let (mut resting, mut kept) = (0, BTreeSet::new());
        wait_until(deadline + self.scale.soon(), || {
            resting = self.stats()?.frames_quarantined;
            if resting == 0 {
                return Ok(false);
            }
            kept = self.frames_of_nobody()?;
            Ok(resting == kept.len() as u64)
        })?;
        let names: Vec<_> = self.guests.iter().map(|g| g.part().name.clone()).collect();
        let order = self.changed_page();
        let others = ask_all(&mut self.guests, &order)?;
        let read_on = others
            .iter()
            .all(|answer| matches!(answer, Answer::Page { version: 2 }));
        self.report.line(
            "paused",
            gone.is_some()
                && had > 0
                && before == 0
                && !kept.is_empty()
                && resting == kept.len() as u64
                && read_on,
            format!(
                "{name}: fenced {} (lease {:.1} s); its entries say that it has {} frames mapped still, \
                 {resting} are in quarantine; {}: {}",
                gone.map_or("NOT in time".into(), |took| format!(
                    "after {:.1} s",
                    took.as_secs_f64()
                )),
                f64::from(self.scale.lease_ttl_ms) / 1e3,
                kept.len(),
                if read_on { "unhindered" } else { "HINDERED" },
                names.join(", "),
            ),
        );
        sleeper.resume()?;
        let mut shown = 0;
        let refused = wait_until(self.scale.soon(), || {
            let refused = matches!(sleeper.ask(&order)?, Answer::Refused { .. });
            shown += u32::from(!refused);
            Ok(refused)
        })?;
        let drained = wait_until(self.scale.soon(), || {
            Ok(self.stats()?.frames_quarantined == 0)
        })?;
        self.report.line(
            "resumed",
            refused.is_some() && drained.is_some(),
            format!(
                "{name}: its old pages are {}{}, the quarantine is {}",
                if refused.is_some() {
                    "refused (SIGBUS)"
                } else {
                    "STILL READABLE"
                },
                match shown {
                    0 => String::new(),
                    times => format!(" after {times} reads of frames in quarantine"),
                },
                drained.map_or("NOT empty".into(), |took| format!(
                    "empty {:.1} s later",
                    took.as_secs_f64()
                )),
            ),
        );
        Ok(())
    }

    /// Frames that are mapped by entries of sessions that are over.
    fn frames_of_nobody(&self) -> Result<BTreeSet<u32>> {
        let names: Vec<_> = self.guests.iter().map(|guest| &guest.part().name).collect();
        let lines = self.grant_lines()?.into_iter();
        let kept = lines.filter(|line| line.mapped && !names.contains(&&line.guest));
        Ok(kept.map(|line| line.frame).collect())
    }
}
