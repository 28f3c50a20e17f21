//! Domains that the administrator attaches and detaches.

use super::admin_types::AdminReply;
use super::core::Core;
use super::identity::DomainIs;
use copage_coherence::msg::FenceReason;
use copage_grants::Epoch;

/// An errno and what to do.
type Refusal = (i32, String);

impl Core {
    /// `copage attach`.
    pub(super) fn attach(
        &mut self,
        domain: &str,
        exports: &[String],
    ) -> Result<AdminReply, Refusal> {
        self.needs_xen()?;
        let is = DomainIs::parse(domain).map_err(|text| (libc::EINVAL, text))?;
        self.exports_are_there(exports)?;
        let attached = self.ctx.guests.attach(is);
        let (guest, is_new) = attached.map_err(|e| (e.errno(), e.to_string()))?;
        if is_new {
            self.ctx.limit_guest(guest);
        }
        let name = self.ctx.guests.get(guest).map(|g| g.name.to_string());
        let name = name.unwrap_or_default();
        for export in exports {
            self.ctx.exports.allow(export, &name);
        }
        self.set_wanted();
        tracing::info!(domain, guest = %name, "attached");
        Ok(AdminReply::Attached { guest: name })
    }

    /// `copage detach`: from these exports, or altogether.
    pub(super) fn detach(
        &mut self,
        domain: &str,
        exports: &[String],
    ) -> Result<AdminReply, Refusal> {
        self.needs_xen()?;
        let is = DomainIs::parse(domain).map_err(|text| (libc::EINVAL, text))?;
        self.exports_are_there(exports)?;
        let guest = self.ctx.guests.attached(&is);
        let guest = guest.and_then(|guest| self.ctx.guests.get(guest));
        let Some(name) = guest.map(|guest| guest.name.to_string()) else {
            return Err((libc::ENOENT, format!("domain {domain:?} is not attached")));
        };
        if let Some(open) = exports.iter().find(|e| self.ctx.exports.allows_all(e)) {
            let text = format!(
                "export {open} allows everybody; detach the domain from all, or export it with --allow"
            );
            return Err((libc::EINVAL, text));
        }
        let listed: Vec<String> = match exports {
            [] => self
                .ctx
                .exports
                .list()
                .into_iter()
                .map(|e| e.name)
                .collect(),
            some => some.to_vec(),
        };
        for export in &listed {
            self.ctx.exports.disallow(export, &name);
        }
        if exports.is_empty() {
            self.ctx.guests.detach(&is);
            self.set_wanted();
        }
        // What it has open of them is open in sessions of before.
        let sessions = self.fence_guest(&name);
        tracing::info!(domain, guest = %name, sessions, "detached");
        Ok(AdminReply::Fenced { sessions })
    }

    /// Fences all sessions of a guest; how many there were.
    pub(super) fn fence_guest(&mut self, guest: &str) -> u64 {
        let epochs: Vec<Epoch> = self
            .conns
            .values()
            .filter_map(|c| c.session.as_ref())
            .filter(|s| *s.name == *guest)
            .map(|s| s.epoch)
            .collect();
        for epoch in &epochs {
            self.ctx.fence(*epoch, FenceReason::Removed);
        }
        epochs.len() as u64
    }

    fn needs_xen(&self) -> Result<(), Refusal> {
        if self.xen.is_some() {
            return Ok(());
        }
        let text = "this daemon serves processes of this machine; domains need backend = \"xen\"";
        Err((libc::EOPNOTSUPP, text.to_owned()))
    }

    fn exports_are_there(&self, exports: &[String]) -> Result<(), Refusal> {
        let known = self.ctx.exports.list();
        match exports.iter().find(|e| known.iter().all(|k| k.name != **e)) {
            Some(unknown) => Err((libc::ENOENT, format!("there is no export {unknown:?}"))),
            None => Ok(()),
        }
    }
}
