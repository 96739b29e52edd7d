//! The instruction set of this process: chosen once, by what the machine has or by `MOE_LAB_ISA`. Bits of results are promised within one set;
//! they may differ between sets.
#![allow(unsafe_code)]

use serde::Serialize;
use std::fmt;
use std::sync::OnceLock;

/// The variable that forces a set.
pub const VARIABLE: &str = "MOE_LAB_ISA";

/// What kernels may use, each set including those before it. `Avx2` means AVX2 and FMA; `Avx512` the parts F, BW, DQ and VL; `Amx` the tiles with
/// bf16, granted by the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Isa {
    Portable,
    Avx2,
    Avx512,
    Avx512Bf16,
    Amx,
}

impl Isa {
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        }
    }

    /// Whether this machine and its system offer the set.
    pub fn available(self) -> bool {
        self <= best()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum IsaError {
    #[error("MOE_LAB_ISA = {0:?} is no instruction set of moe_lab; this machine has {machine}; unset it for the best", machine = machine())]
    Unknown(String),
    #[error("MOE_LAB_ISA = {0}: this machine has only {machine}; unset it for the best", machine = machine())]
    Missing(Isa),
}

fn machine() -> String {
    available().map(Isa::name).collect::<Vec<_>>().join(", ")
}

/// The sets of this machine, plainest first.
pub fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

/// The best set of this machine.
fn best() -> Isa {
    static BEST: OnceLock<Isa> = OnceLock::new();
    *BEST.get_or_init(detect)
}

/// The set of this process, or why `MOE_LAB_ISA` cannot be met. Programs call it before any work.
pub fn check() -> Result<Isa, IsaError> {
    static CHOSEN: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
    CHOSEN.get_or_init(|| choose(std::env::var_os(VARIABLE).map(|value| value.to_string_lossy().into_owned()))).clone()
}

fn choose(wanted: Option<String>) -> Result<Isa, IsaError> {
    match wanted {
        None => Ok(best()),
        Some(name) if name.is_empty() => Ok(best()),
        Some(name) => match Isa::ALL.into_iter().find(|isa| isa.name() == name) {
            None => Err(IsaError::Unknown(name)),
            Some(isa) if !isa.available() => Err(IsaError::Missing(isa)),
            Some(isa) => Ok(isa),
        },
    }
}

/// The set of this process. Panics where `check` would err.
#[inline]
pub fn current() -> Isa {
    static CURRENT: OnceLock<Isa> = OnceLock::new();
    *CURRENT.get_or_init(|| check().unwrap_or_else(|error| panic!("{error}")))
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("fma")) {
        return Isa::Portable;
    }
    if !(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")) {
        return Isa::Avx2;
    }
    match (has!("avx512bf16"), tiles()) {
        (false, _) => Isa::Avx512,
        (true, false) => Isa::Avx512Bf16,
        (true, true) => Isa::Amx,
    }
}

/// Whether the CPU has tiles with bf16, the system saves them, and lets this process use them (it must be asked).
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    if __cpuid(0).eax < 7 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    let (bf16, tile) = (features >> 22 & 1, features >> 24 & 1);
    // SAFETY: the call reads two integers and only widens what this process may use; a kernel without it answers with an error.
    bf16 == 1 && tile == 1 && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) } == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn tiles() -> bool {
    false // other systems grant them in other ways, which nobody has tested
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_met_or_refused_by_name_with_what_the_machine_has() {
        let name = |isa: Isa| Some(isa.name().to_string());
        assert_eq!((choose(None), choose(Some(String::new()))), (Ok(best()), Ok(best())));
        for isa in Isa::ALL {
            let chosen = choose(name(isa));
            if isa.available() {
                assert_eq!(chosen, Ok(isa));
            } else {
                let error = chosen.unwrap_err().to_string();
                assert!(error.contains(isa.name()) && error.contains("has only portable"), "{error}");
            }
        }
        let error = choose(Some("sse9".into())).unwrap_err().to_string();
        assert!(error.contains("\"sse9\"") && error.contains(&machine()), "{error}");
        assert!(choose(Some("AVX2".into())).is_err());
    }
}
