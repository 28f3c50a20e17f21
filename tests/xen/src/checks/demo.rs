//! `copage demo` with domains as its guests, and the pipe by which it speaks to them.

use crate::guest::{Guest, Kind, Setup};
use crate::lab::Lab;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::time::Duration;

/// How long the demo may take when all guests are up.
const DEMO_LIMIT: Duration = Duration::from_secs(300);
/// What the demo shares: programs, libraries and modules of dom0.
const DIR: &str = "/usr";

/// The kinds of the demo's guests. The last is destroyed, the one before it paused.
const KINDS: [Kind; 3] = [Kind::Pvh, Kind::Pv, Kind::Pvh];

/// The demo's own steps decide; its screen is shown and kept.
pub fn demo(lab: &Lab) -> Result<String> {
    let series = lab.series()?;
    let (oldest, newest) = (series.first(), series.last());
    let (oldest, newest) = oldest.zip(newest).context("no guest kernels")?;
    let mut guests = Vec::new();
    let mut parts = Vec::new();
    for (n, kind) in (1..).zip(KINDS) {
        let name = format!("guest{n}");
        let series = if n == KINDS.len() { newest } else { oldest };
        let setup = Setup {
            series: Some(series.clone()),
            ..Setup::new(kind, &name, 192)
        };
        guests.push(Guest::create(lab, &setup)?);
        parts.push(json!({
            "name": name,
            "kind": format!("{}, Linux {series}", kind.to_string().to_uppercase()),
            "agent": ["copage-xen-lab", "pipe", name, "--",
                      "copage", "demo-agent", "--connect", "xen", "--name", name],
            "kill": ["xl", "destroy", name],
            "stop": ["xl", "pause", name],
            "resume": ["xl", "unpause", name],
        }));
    }
    for guest in &guests {
        guest.ready()?;
    }
    let cast = json!({"hypervisor": hypervisor(lab)?, "guests": parts});
    std::fs::write(lab.work().join("cast.json"), cast.to_string())?;
    let screen = lab.log("txt");
    let words = format!("copage demo --cast cast.json {DIR}");
    let mut job = lab.spawn(&words)?;
    let mut shown = 0;
    let ended = lab.wait("the demo's end", DEMO_LIMIT, || {
        // Lines that are whole when it has ended are all there are.
        let ended = job.wait(Duration::from_millis(150))?;
        let said = std::fs::read_to_string(&job.out)?;
        for line in said.lines().take(said.matches('\n').count()).skip(shown) {
            lab.show(line)?;
            shown += 1;
        }
        std::fs::write(&screen, &said)?;
        Ok(ended)
    })?;
    let output = Lab::output(&words, &job, ended)?;
    std::fs::write(lab.log("err"), &output.stderr)?;
    ensure!(output.success(), "{ended:?}: {}", output.stderr.trim());
    Ok(format!("{shown} lines, all as they should be"))
}

/// Its version, and dom0's.
fn hypervisor(lab: &Lab) -> Result<String> {
    let info = lab.sh("xl info; uname -r")?;
    let info = info.text()?;
    let version = info
        .lines()
        .find_map(|line| line.strip_prefix("xen_version"))
        .context("xl info: no xen_version")?;
    let linux = info.lines().last().unwrap_or_default();
    Ok(format!(
        "Xen {}, dom0 Linux {linux}",
        version.trim_matches([' ', ':'])
    ))
}

/// Programs in a guest behind pipes: long lines both ways, statuses, deaths of either side.
pub fn pipes(lab: &Lab) -> Result<String> {
    let guest = Guest::start(lab, Kind::Pvh, "piped", 192)?;
    let pipe = "copage-xen-lab pipe piped --";
    // Longer than any node.
    let long = "x".repeat(20_000);
    std::fs::write(lab.work().join("long"), format!("{long}\nand more\n"))?;
    let back = lab.sh(&format!("{pipe} cat < long"))?;
    ensure!(
        back.success() && back.stdout == format!("{long}\nand more\n"),
        "20,009 bytes came back as {} ({:?}): {}",
        back.stdout.len(),
        back.ended,
        back.stderr
    );
    let status = lab.sh(&format!("{pipe} sh -c 'exit 7'; echo $?"))?;
    ensure!(status.text()? == "7", "{status:?}");
    let signal = lab.sh(&format!("{pipe} sh -c 'kill -11 $$'; echo $?"))?;
    ensure!(signal.text()? == "139", "{signal:?}");
    let none = lab.sh(&format!("{pipe} no-such-program"))?;
    ensure!(none.stderr.contains("os error 2"), "{none:?}");
    let gone = || -> Result<Option<()>> {
        let found = guest.run("pidof sleep")?;
        Ok(found.stdout.trim().is_empty().then_some(()))
    };
    let there = || Ok(gone()?.is_none().then_some(()));
    let killed = lab.spawn(&format!("sleep 1000 | {pipe} sleep 1001"))?;
    lab.wait("the program", Duration::from_secs(20), there)?;
    drop(killed);
    lab.wait(
        "the end of a program whose pipe was killed",
        Duration::from_secs(20),
        gone,
    )?;
    let mut left = lab.spawn(&format!("sleep 1000 | {pipe} sleep 1001"))?;
    lab.wait("the program", Duration::from_secs(20), there)?;
    lab.sh("xl pause piped")?.text()?;
    let waits = left.wait(Duration::from_secs(4))?.is_none();
    lab.sh("xl unpause piped")?.text()?;
    ensure!(waits, "the pipe to a paused guest ended");
    guest.destroy()?;
    // The shell of the job waits for all of its pipeline.
    let said = lab.wait("the pipe's error", Duration::from_secs(20), || {
        left.wait(Duration::ZERO)?;
        let said = std::fs::read_to_string(&left.err)?;
        Ok(said.contains("gone").then_some(said))
    })?;
    lab.wait("the pipes' nodes to go", Duration::from_secs(20), || {
        let nodes = lab.sh("xenstore-ls /local/domain")?;
        Ok((!nodes.text()?.contains("pipe")).then_some(()))
    })?;
    Ok(format!(
        "20 kB both ways, status 7, SIGSEGV, killed, paused, destroyed ({})",
        said.trim()
    ))
}
