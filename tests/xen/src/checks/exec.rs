//! Programs run off a share in guests whose hypervisor executes no shared page.
//!
//! Cannot show what a guest's memory pressure does to the copies: nothing presses here.

use crate::daemon::Daemon;
use crate::guest::{Guest, Kind, Setup};
use crate::job::Ended;
use crate::lab::Lab;
use crate::output::Output;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(90);
/// A whole second copy would be hundreds.
const TOUCHED_MORE_PAGES: u64 = 8;
/// Longer than what keeps a mount keeps it unused.
const KEPT: Duration = Duration::from_secs(40);

/// The first two numbers of the line that `copage exec` says at its end.
fn copied(output: &Output) -> Result<(u64, u64)> {
    let line = output
        .stderr
        .lines()
        .find(|line| line.starts_with("copage exec: Xen executes no shared page"))
        .with_context(|| format!("nothing is said of copies: {output:?}"))?;
    let mut numbers = line.split(' ').filter_map(|word| word.parse().ok());
    let both = numbers.next().zip(numbers.next());
    both.with_context(|| line.to_owned())
}

/// `bash`, which no guest has, with loader and libraries off an export of dom0's own `/usr`.
pub fn exec(lab: &Lab) -> Result<String> {
    let newest = lab.series()?.last().context("no guest kernels")?.clone();
    let guests = [
        Guest::create(
            lab,
            &Setup {
                series: Some(newest),
                ..Setup::new(Kind::Pvh, "exec-pvh", 160)
            },
        )?,
        Guest::create(lab, &Setup::new(Kind::Pv, "exec-pv", 160))?,
    ];
    let mut configuration = String::from(
        "backend = \"xen\"\nframes_mib = 32\nxen.cache_domain_mib = 64\n\
         [[export]]\nname = \"usr\"\npath = \"/usr\"\n",
    );
    for guest in &guests {
        let name = guest.name();
        configuration += &format!("[[guest]]\nname = {name:?}\ndomain = {name:?}\n");
    }
    let mut daemon = Daemon::start(lab, &configuration)?;
    let mut seen = Vec::new();
    for guest in &guests {
        guest.ready()?;
        seen.push(format!("{}: {}", guest.name(), in_guest(lab, guest)?));
    }
    lab.wait("the end of what keeps the mounts", KEPT, || {
        let guests = daemon.json("guests")?;
        let none = guests["guests"].as_array().is_some_and(Vec::is_empty);
        Ok(none.then_some(()))
    })?;
    for guest in &guests {
        let left = guest.run("pidof copage; mount | grep copage; ls /tmp | grep copage-exec")?;
        ensure!(left.stdout.is_empty(), "left behind: {left:?}");
        // Who may not mount has whole copies.
        let words = "mv /dev/fuse /dev/away; copage exec usr bash -c 'echo $BASH_VERSION; exit 9'";
        let output = guest.run_for(words, LIMIT)?;
        ensure!(output.ended == Ended::Exit(9), "{output:?}");
        ensure!(output.stdout.len() > 3, "{output:?}");
        ensure!(
            output.stderr.contains("for this program alone"),
            "{output:?}"
        );
    }
    let audit = daemon.json("audit")?;
    ensure!(audit["ok"] == true, "{audit}");
    daemon.stop()?;
    for guest in guests {
        guest.destroy()?;
    }
    Ok(seen.join("; "))
}

fn in_guest(lab: &Lab, guest: &Guest<'_>) -> Result<String> {
    let run = |words: &str| guest.run_for(words, LIMIT);
    ensure!(!run("bash -c :")?.success(), "the guest has a bash");
    // Arguments, output and status; a child of its own, whose status it sees.
    let script = "copage exec usr bin/bash -c 'echo \"$0 $1\"; (exit 3); echo $? | { read x; echo got $x; }; exit 7' a 'b  c'";
    let first = run(script)?;
    ensure!(first.ended == Ended::Exit(7), "{first:?}");
    ensure!(first.stdout == "a b  c\ngot 3\n", "{first:?}");
    let (pages, of_pages) = copied(&first)?;
    ensure!(pages > 50 && pages < of_pages, "{first:?}");
    // The same again, from another process: nothing more is copied. Beside a third that runs on.
    let lasting = guest.spawn("copage exec -q usr bash -c 'echo up; sleep 1000; echo over'")?;
    lab.wait("a program that lasts", LIMIT, || {
        Ok(lasting.said()?.contains("up").then_some(()))
    })?;
    let keepers = run("ps | grep -c '[e]xec-keeper'")?;
    ensure!(keepers.text()? == "1", "{keepers:?}");
    let second = run(script)?;
    let (more, _) = copied(&second)?;
    // The loader may touch another page or two: where things lie is different each time.
    ensure!(more <= pages + TOUCHED_MORE_PAGES, "{first:?} {second:?}");
    lasting.signal(15)?;
    lasting.wait(LIMIT)?;
    // Its text is that of the share, by the kernel's own list.
    let maps =
        run("copage exec -q usr bash -c 'while read -r l; do echo \"$l\"; done < /proc/$$/maps'")?;
    let text: Vec<&str> = maps
        .text()?
        .lines()
        .filter(|l| l.contains(" r-xp "))
        .collect();
    let files = text.iter().filter(|l| l.contains('/')).count();
    ensure!(files >= 3 && !maps.stdout.contains("gntdev"), "{maps:?}");
    // A signal that ends it, and one that is passed on.
    let killed = run("copage exec -q usr bash -c 'kill -KILL $$'")?;
    ensure!(killed.ended == Ended::Exit(128 + 9), "{killed:?}");
    let words = "copage exec -q usr bash -c 'trap \"echo told; exit 5\" TERM; echo up; while :; do sleep 0.2; done' > /tmp/said & \
         until grep -q up /tmp/said; do sleep 0.1; done; kill -TERM $!; wait $!; echo $?; cat /tmp/said";
    let told = run(words)?;
    ensure!(told.stdout == "5\nup\ntold\n", "{told:?}");
    // A process that outlives the program runs on from the mount, and is waited for by nobody.
    // Out of the group that is killed with this command.
    let words = "setsid copage exec -q usr bash -c '(sleep 15; for ((n = 0; n < 3; n++)); do echo $n; done > /tmp/later) & exit 4'; echo $?";
    let outlived = run(words)?;
    ensure!(outlived.stdout == "4\n", "{outlived:?}");
    lab.wait("the process that was left", KEPT, || {
        let later = guest.run("cat /tmp/later")?;
        Ok((later.stdout == "0\n1\n2\n").then_some(()))
    })?;
    Ok(format!(
        "bash, loader and libraries: {pages} of {of_pages} pages copied, a second process beside it copied {}",
        more.saturating_sub(pages)
    ))
}
