//! Intel's tiles through `asm!` (their intrinsics are not stable): 32 rows by 32 columns as 2 by 2 tiles of sums, 32 numbers of k at a step.

use super::tile::{Strip, Tile};
use crate::isa::{self, Isa};
use std::arch::asm;

const ROWS: usize = 32;
const COLS: usize = 32;

pub const TILE: Tile = Tile { rows: ROWS, cols: COLS, pairs: true, unit: 16, run, half: None, enter, leave };

/// Palette 1, and for each of the eight tiles 64 bytes a row and 16 rows.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPE: Shape = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut i = 0;
    while i < 8 {
        (row_bytes[i], rows[i]) = (64, 16);
        i += 1;
    }
    Shape { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

fn enter() {
    // SAFETY: only reached where the process was granted the tiles.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPE, options(nostack, readonly)) }
}

fn leave() {
    // SAFETY: as above.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// `rounds` of products of tiles without a load, for the peak of the machine; returns how many operations they were. The set must be `Amx`.
pub fn chains(rounds: usize) -> usize {
    assert!(isa::current() == Isa::Amx, "no tiles");
    enter();
    // SAFETY: the process was granted the tiles and this thread configured them; the loop touches nothing else.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) rounds.max(1) => _,
            options(nostack, nomem),
        );
    }
    leave();
    4 * 2 * 16 * 16 * 32 * rounds.max(1)
}

/// # Safety
/// As `Tile::run` says; `enter` was called on this thread; a_k is 1 and k a multiple of 16.
unsafe fn run(s: Strip) {
    #[repr(align(64))]
    struct Sums([f32; ROWS * COLS]);
    let mut sums = std::mem::MaybeUninit::<Sums>::uninit();
    debug_assert!(s.a_k == 1 && s.k.is_multiple_of(16));
    // SAFETY: a tile of `a` reads 16 rows of 64 bytes, one of `b` 16 rows of 64 bytes, and they advance by 16 elements of k a step: inside the
    // strip. The sums are 32 rows of 128 bytes. Nothing else in this process uses the tile registers.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "test {steps}, {steps}",
            "jz 3f",
            "2:",
            "tileloadd tmm4, [{a0} + {a_row}*1]",
            "tileloadd tmm6, [{b} + {b_row}*1]",
            "tileloadd tmm7, [{b} + {b_row}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {a_row}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 64",
            "add {a1}, 64",
            "add {b}, {b_step}",
            "dec {steps}",
            "jnz 2b",
            "3:",
            "tilestored [{sums} + {wide}*1], tmm0",
            "tilestored [{sums} + {wide}*1 + 64], tmm1",
            "tilestored [{sums} + {wide}*1 + 2048], tmm2",
            "tilestored [{sums} + {wide}*1 + 2112], tmm3",
            steps = inout(reg) s.k / 16 => _,
            a0 = inout(reg) s.a => _,
            a1 = inout(reg) s.a.wrapping_add(16 * s.a_row) => _,
            b = inout(reg) s.b => _,
            a_row = in(reg) s.a_row * 4,
            b_row = in(reg) s.b_k * 4,
            b_step = in(reg) s.b_k * 64,
            sums = in(reg) sums.as_mut_ptr(),
            wide = in(reg) COLS * 4,
            options(nostack),
        );
        let sums = &sums.assume_init_ref().0;
        for (r, row) in sums.chunks_exact(COLS).enumerate() {
            let to = &mut *s.dst.add(r * s.stride).cast::<[f32; COLS]>();
            for (to, sum) in to.iter_mut().zip(row) {
                *to = if s.add { *to + *sum } else { *sum };
            }
        }
    }
}
