//! Operands as the tiles read them: panels whose rows lie side by side, zeros up to the edge, numbers as they are, rounded to bf16, or as pairs of bf16.

use super::number::Number;
#[cfg(target_arch = "x86_64")]
use super::wide;
#[cfg(target_arch = "x86_64")]
use crate::isa::{self, Isa};
use crate::kernels::bf16::{Bf16, pair, round};

/// What an element of a packed operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// The f32 itself.
    Plain,
    /// The f32 rounded to bf16.
    Rounded,
    /// Two neighbours along k as bf16, the first in the lower half.
    Pair,
}

impl Element {
    /// Numbers along k that one element holds.
    #[inline(always)]
    pub fn numbers(self) -> usize {
        if self == Element::Pair { 2 } else { 1 }
    }
}

/// An operand of either kind of number.
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    Wide(Source<'a, f32>),
    Narrow(Source<'a, Bf16>),
}

impl<'a> Operand<'a> {
    /// The same from column `start` on.
    pub fn columns(self, start: usize) -> Self {
        match self {
            Operand::Wide(source) => Operand::Wide(source.columns(start)),
            Operand::Narrow(source) => Operand::Narrow(source.columns(start)),
        }
    }

    /// The source, if it is of f32 and its lines lie one after the other and run along k, or not, as `along_k` says: tiles of f32 can read it.
    pub fn in_place(self, along_k: bool) -> Option<Source<'a, f32>> {
        match self {
            Operand::Wide(source) if source.along_k == along_k && source.order.is_none() => Some(source),
            _ => None,
        }
    }

    /// Where the first pair lies and how far apart columns are, in elements, if pairs of neighbours along k can be read as they are. Columns a page apart
    /// would fall upon one set of the first cache.
    pub fn pairs(self, k: usize) -> Option<(*const f32, usize)> {
        const PAGE: usize = 4096 / size_of::<Bf16>();
        match self {
            Operand::Narrow(source)
                if source.along_k && source.order.is_none() && !source.stride.is_multiple_of(PAGE) =>
            {
                let whole = k.is_multiple_of(2) && source.stride.is_multiple_of(2);
                let from = source.data.as_ptr().cast::<f32>();
                (whole && from.is_aligned()).then_some((from, source.stride / 2))
            }
            _ => None,
        }
    }

    /// Whether its lines run along k.
    pub fn along_k(self) -> bool {
        match self {
            Operand::Wide(source) => source.along_k,
            Operand::Narrow(source) => source.along_k,
        }
    }

    /// Whether both are the same lines of the same numbers.
    pub fn is(self, other: Self) -> bool {
        match (self, other) {
            (Operand::Wide(a), Operand::Wide(b)) => a.is(b),
            (Operand::Narrow(a), Operand::Narrow(b)) => a.is(b),
            _ => false,
        }
    }
}

/// A k × w operand in memory, made of lines that run along k or along w.
#[derive(Clone, Copy)]
pub struct Source<'a, S> {
    pub data: &'a [S],
    /// Numbers from one line of `data` to the next.
    pub stride: usize,
    pub along_k: bool,
    /// Which line of `data` each line is, where they do not lie one after the other.
    pub order: Option<&'a [u32]>,
}

/// Elements of k that are turned at a time.
const TURN: usize = 8;

impl<'a, S: Number> Source<'a, S> {
    /// Where line i starts.
    #[inline(always)]
    fn line(self, i: usize) -> usize {
        self.order.map_or(i, |order| order[i] as usize) * self.stride
    }

    /// Number `at` of line i, to be asked for: beyond the last line some number, which is not read.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn ask(self, i: usize, at: usize) -> *const S {
        let i = self.order.map_or(i, |order| order[i.min(order.len() - 1)] as usize);
        self.data.as_ptr().wrapping_add(i * self.stride + at)
    }

    fn is(self, other: Self) -> bool {
        let lines = |s: Self| (s.stride, s.along_k, s.order.map(<[u32]>::as_ptr));
        std::ptr::eq(self.data, other.data) && lines(self) == lines(other)
    }

    /// The same from column `start` on.
    fn columns(self, start: usize) -> Self {
        match self.order {
            Some(order) if self.along_k => Source { order: Some(&order[start..]), ..self },
            _ => {
                let before = if self.along_k { start * self.stride } else { start };
                Source { data: &self.data[before.min(self.data.len())..], ..self }
            }
        }
    }

    /// Packs numbers l0..l1 of k and the columns j0..j1 as panels of W columns, `stride` apart: each [depth, W], one element of k after the other,
    /// zeros beyond.
    #[inline(always)]
    pub fn panels<const W: usize>(
        self,
        element: Element,
        l: (usize, usize),
        j: (usize, usize),
        to: &mut [u32],
        (stride, depth): (usize, usize),
    ) {
        let spans = (j.0..j.1).step_by(W).map(|start| (start, j.1));
        if !self.along_k {
            // Row by row through all panels: memory is read in its order.
            let (rows, panels) = self.block::<W>(element, l, j, to, (stride, depth));
            for e in 0..depth {
                let at = l.0 + e * element.numbers();
                let done = match e < rows {
                    true => panels,
                    false => self.copied::<W>(element, (at, l.1), j, to, (stride, depth), e),
                };
                for (p, span) in spans.clone().enumerate().skip(done) {
                    let to = to[p * stride + e * W..].first_chunk_mut().expect("room for every panel");
                    self.piece::<W>(element, at, l.1, span, to);
                }
            }
        } else {
            spans
                .enumerate()
                .for_each(|(p, span)| self.panel::<W>(element, l, span, &mut to[p * stride..][..depth * W]));
        }
    }

    /// The first elements of the first panels by long vectors, where there are any: how many elements and panels that were.
    #[inline(always)]
    fn block<const W: usize>(
        self,
        element: Element,
        l: (usize, usize),
        j: (usize, usize),
        to: &mut [u32],
        (stride, depth): (usize, usize),
    ) -> (usize, usize) {
        #[cfg(target_arch = "x86_64")]
        if wide::serves(isa::current(), element, W) {
            let rows = ((l.1 - l.0) / element.numbers()).min(depth);
            let panels = (j.1 - j.0) / W;
            let panels = if W == 8 && panels == 1 { 0 } else { panels }; // a vector is two of them
            if rows > 0 && panels > 0 {
                let last = l.0 + rows * element.numbers() - 1;
                let farthest =
                    self.order.map_or(last, |order| order[l.0..=last].iter().copied().max().unwrap_or(0) as usize);
                let end = farthest * self.stride + j.0 + panels * W;
                assert!(end <= self.data.len(), "a panel reads beyond its matrix");
                assert!((panels - 1) * stride + rows * W <= to.len(), "no room for a panel");
                let row = |i: usize| self.ask(l.0 + i, j.0);
                // SAFETY: the set serves; by the assertions all that is read and written is there.
                unsafe { wide::copy::<S, W>(row, element, (to.as_mut_ptr(), stride), (rows, panels)) }
                return (rows, panels);
            }
        }
        let _ = (element, l, j, to, stride, depth);
        (0, 0)
    }

    /// Element e of the first panels by vectors, as far as whole vectors can be read and written, and how many panels that were.
    #[inline(always)]
    fn copied<const W: usize>(
        self,
        element: Element,
        (at, end): (usize, usize),
        j: (usize, usize),
        to: &mut [u32],
        (stride, depth): (usize, usize),
        e: usize,
    ) -> usize {
        #[cfg(target_arch = "x86_64")]
        if isa::current() >= Isa::Avx2 && W != 4 && at < end {
            // A panel of six is moved as eight: the two beyond are written again by the next element, or lie between panels.
            let vector = W.next_multiple_of(8);
            let second = element == Element::Pair && at + 1 < end;
            let [row, below] = [at, at + usize::from(second)].map(|i| self.line(i) + j.0);
            let readable = |panels: usize| row.max(below) + (panels - 1) * W + vector <= self.data.len();
            let writable = |panels: usize| (panels - 1) * stride + (depth - 1) * W + vector <= to.len();
            let mut panels = (j.1 - j.0) / W;
            while panels > 0 && !(readable(panels) && writable(panels)) {
                panels -= 1;
            }
            let from = self.data[row..].as_ptr();
            let below = if second { Some(self.data[below..].as_ptr()) } else { None };
            assert!(vector == W || stride >= depth * W + vector - W, "room between panels");
            // SAFETY: the machine has AVX2; what is read and written lies inside data and to.
            unsafe { x86::copy::<S, W>((from, below), element, to[e * W..].as_mut_ptr(), panels, stride) }
            return panels;
        }
        let _ = (element, at, end, j, to, stride, depth, e);
        0
    }

    /// One element of k of up to W columns.
    #[inline(always)]
    fn piece<const W: usize>(self, element: Element, at: usize, end: usize, j: (usize, usize), to: &mut [u32; W]) {
        let x = self.row::<W>(at, end, j);
        match element {
            Element::Plain => (0..W).for_each(|c| to[c] = x[c].to_bits()),
            Element::Rounded => (0..W).for_each(|c| to[c] = round(x[c])),
            Element::Pair => {
                let y = self.row::<W>(at + 1, end, j);
                (0..W).for_each(|c| to[c] = pair(x[c], y[c]));
            }
        }
    }

    /// One panel of up to W columns.
    #[inline(always)]
    fn panel<const W: usize>(self, element: Element, l: (usize, usize), j: (usize, usize), to: &mut [u32]) {
        let (rows, _) = to.as_chunks_mut::<W>();
        if !self.along_k {
            let at = |e: usize| l.0 + e * element.numbers();
            rows.iter_mut().enumerate().for_each(|(e, to)| self.piece::<W>(element, at(e), l.1, j, to));
        } else {
            let turned = self.turned::<W>(element, l, j, rows);
            let (l, rows) = ((l.0 + turned * element.numbers(), l.1), &mut rows[turned..]);
            let mut block = [[0u32; TURN]; W];
            for (b, rows) in rows.chunks_mut(TURN).enumerate() {
                for c in 0..W {
                    let column = if j.0 + c < j.1 { Some(j.0 + c) } else { None };
                    block[c] = self.run(element, column, l.0 + b * TURN * element.numbers(), l.1);
                }
                match <&mut [[u32; W]; TURN]>::try_from(&mut *rows) {
                    Ok(rows) => (0..TURN).for_each(|i| (0..W).for_each(|c| rows[i][c] = block[c][i])),
                    Err(_) => {
                        rows.iter_mut().enumerate().for_each(|(i, row)| (0..W).for_each(|c| row[c] = block[c][i]))
                    }
                }
            }
        }
    }

    /// Turns columns by vectors as far as whole blocks of `TURN` elements reach, and says how many rows of the panel that were.
    #[inline(always)]
    fn turned<const W: usize>(
        self,
        element: Element,
        l: (usize, usize),
        j: (usize, usize),
        rows: &mut [[u32; W]],
    ) -> usize {
        #[cfg(target_arch = "x86_64")]
        if isa::current() >= Isa::Avx2 {
            let numbers = element.numbers();
            let whole = |vector: usize| (rows.len() / vector).min((l.1 - l.0) / (vector * numbers)) * vector;
            let many = if wide::serves(isa::current(), element, W) { whole(wide::LANES) } else { 0 };
            let all = whole(TURN);
            let column = |c: usize| match j.0 + c < j.1 {
                true => self.data[self.line(j.0 + c) + l.0..][..all * numbers].as_ptr(),
                false => std::ptr::null(),
            };
            let columns: [*const S; W] = std::array::from_fn(column);
            // SAFETY: the machine has AVX2, and more where `wide` serves; each column has the numbers of all blocks, or is none, and rows has
            // theirs.
            unsafe {
                if many > 0 {
                    let next = std::array::from_fn(|c| self.ask(j.0 + W + c, l.0));
                    wide::turn(&columns, &next, element, &mut rows[..many]);
                }
                if all > many {
                    x86::turn((&columns, many * numbers), element, &mut rows[many..all]);
                }
            }
            return all;
        }
        let _ = (element, l, j, rows);
        0
    }

    /// The same with the elements of one column side by side: column c starts at c·`stride` and has `depth` elements, a multiple of 8 where lines run
    /// along w.
    #[inline(always)]
    pub fn lines(
        self,
        element: Element,
        l: (usize, usize),
        j: (usize, usize),
        to: &mut [u32],
        stride: usize,
        depth: usize,
    ) {
        if self.along_k {
            let columns = to.chunks_mut(stride).zip(j.0..);
            return columns.for_each(|(to, c)| self.laid(element, Some(c).filter(|c| *c < j.1), l, &mut to[..depth]));
        }
        const W: usize = 8;
        for (block, columns) in to.chunks_mut(stride * W).enumerate() {
            for e in (0..depth).step_by(TURN) {
                let from = l.0 + e * element.numbers();
                let mut turned = [[0u32; W]; TURN];
                let span = (j.0 + block * W, j.1.max(j.0 + block * W));
                self.panel::<W>(element, (from, l.1.max(from)), span, turned.as_flattened_mut());
                let turned = transposed(turned);
                columns.chunks_mut(stride).zip(turned).for_each(|(to, x)| to[e..e + TURN].copy_from_slice(&x));
            }
        }
    }

    /// The elements of a column, which runs along k; zeros for no column.
    #[inline(always)]
    fn laid(self, element: Element, column: Option<usize>, l: (usize, usize), to: &mut [u32]) {
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        if let Some(column) = column.filter(|_| element == Element::Pair && isa::current() >= Isa::Avx512Bf16) {
            done = ((l.1 - l.0) / 2).min(to.len()) / wide::LANES * wide::LANES;
            if done > 0 {
                let from = &self.data[self.line(column) + l.0..][..2 * done];
                // SAFETY: the machine has the set; both sides have the elements.
                unsafe { wide::lay(from.as_ptr(), &mut to[..done]) }
            }
        }
        for (e, to) in to[done..].chunks_mut(TURN).enumerate() {
            let run = self.run(element, column, l.0 + (done + e * TURN) * element.numbers(), l.1);
            to.copy_from_slice(&run[..to.len()]);
        }
    }

    /// Numbers j0..j1 of row l, which runs along w; zeros beyond and for l ≥ end.
    #[inline(always)]
    fn row<const W: usize>(self, l: usize, end: usize, j: (usize, usize)) -> [f32; W] {
        let cols = (j.1 - j.0).min(W);
        if l < end && cols == W {
            let row: &[S; W] = self.data[self.line(l) + j.0..][..W].try_into().expect("a whole row");
            return row.map(S::to_f32);
        }
        let mut row = [0.0; W];
        if l < end && cols > 0 {
            let from = &self.data[self.line(l) + j.0..][..cols];
            row.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
        }
        row
    }

    /// The next elements of a column, which runs along k; zeros for no column and from `end` on.
    #[inline(always)]
    fn run(self, element: Element, column: Option<usize>, l: usize, end: usize) -> [u32; TURN] {
        let mut whole = [0.0; 2 * TURN];
        let count = end.saturating_sub(l).min(TURN * element.numbers());
        let mut to = [0; TURN];
        let Some(column) = column.filter(|_| count > 0) else { return to };
        let from = &self.data[self.line(column) + l..][..count];
        // Whole runs by loops of fixed length.
        match from.as_chunks::<TURN>() {
            ([first, second], []) => {
                (0..TURN).for_each(|i| (whole[i], whole[TURN + i]) = (first[i].to_f32(), second[i].to_f32()));
            }
            ([first], []) => (0..TURN).for_each(|i| whole[i] = first[i].to_f32()),
            _ => whole.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32()),
        }
        match element {
            Element::Plain => (0..TURN).for_each(|i| to[i] = whole[i].to_bits()),
            Element::Rounded => (0..TURN).for_each(|i| to[i] = round(whole[i])),
            Element::Pair => (0..TURN).for_each(|i| to[i] = pair(whole[2 * i], whole[2 * i + 1])),
        }
        to
    }
}

#[inline(always)]
fn transposed(x: [[u32; TURN]; TURN]) -> [[u32; TURN]; TURN] {
    #[cfg(target_arch = "x86_64")]
    if isa::current() >= Isa::Avx2 {
        // SAFETY: the machine has AVX2.
        return unsafe { x86::transposed(x) };
    }
    std::array::from_fn(|i| std::array::from_fn(|j| x[j][i]))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Element, Number, TURN};
    use std::arch::x86_64::*;

    /// Row e of `rows` becomes element e of every column from its number `start` on; a null column gives zeros.
    ///
    /// # Safety
    /// The machine has AVX2. `rows` are a multiple of 8, and a column has all their numbers or is null.
    #[target_feature(enable = "avx2")]
    #[inline]
    pub unsafe fn turn<S: Number, const W: usize>(
        (columns, start): (&[*const S; W], usize),
        element: Element,
        rows: &mut [[u32; W]],
    ) {
        let end = rows.as_mut_ptr_range().end.cast::<f32>();
        for (block, rows) in rows.chunks_exact_mut(TURN).enumerate() {
            for first in (0..W).step_by(8) {
                let mut x = [_mm256_setzero_ps(); 8];
                for c in 0..8 {
                    if first + c < W && !columns[first + c].is_null() {
                        // SAFETY: the column has the numbers of every block.
                        let from = unsafe { columns[first + c].add(start + block * TURN * element.numbers()) };
                        x[c] = unsafe { elements(from, element) };
                    }
                }
                for (i, x) in transpose(x).into_iter().enumerate() {
                    let to = rows[i][first..].as_mut_ptr().cast::<f32>();
                    // SAFETY: a row has W - first numbers. A row of six is written with two of the next, which is written after it, or has none.
                    unsafe {
                        if W >= 8 || (W == 6 && to.wrapping_add(8) <= end) {
                            _mm256_storeu_ps(to, x);
                        } else {
                            let x = std::mem::transmute::<__m256, [f32; 8]>(x);
                            std::ptr::copy_nonoverlapping(x.as_ptr(), to, W);
                        }
                    }
                }
            }
        }
    }

    /// Numbers p·W.. of a row, and of the row below it for pairs, become element p·stride.. of `to`, for p in 0..panels.
    ///
    /// # Safety
    /// The machine has AVX2; whole vectors of W, rounded up to eight, are readable and writable at each of these places.
    #[target_feature(enable = "avx2")]
    #[inline]
    pub unsafe fn copy<S: Number, const W: usize>(
        (from, below): (*const S, Option<*const S>),
        element: Element,
        to: *mut u32,
        panels: usize,
        stride: usize,
    ) {
        for p in 0..panels {
            for c in (0..W).step_by(8) {
                // SAFETY: the caller's.
                unsafe {
                    let x = S::eight(from.add(p * W + c));
                    let x = match element {
                        Element::Plain => _mm256_castps_si256(x),
                        Element::Rounded => round(x),
                        Element::Pair => {
                            let y = below.map_or(_mm256_setzero_ps(), |below| S::eight(below.add(p * W + c)));
                            _mm256_or_si256(_mm256_srli_epi32::<16>(round(x)), round(y))
                        }
                    };
                    _mm256_storeu_si256(to.add(p * stride + c).cast(), x);
                }
            }
        }
    }

    /// # Safety
    /// The machine has AVX2 and the numbers of eight elements are readable.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn elements<S: Number>(from: *const S, element: Element) -> __m256 {
        // SAFETY: the caller's.
        let low = unsafe { S::eight(from) };
        match element {
            Element::Plain => low,
            Element::Rounded => _mm256_castsi256_ps(round(low)),
            Element::Pair => {
                let high = unsafe { S::eight(from.add(8)) };
                let pairs = |x: __m256| {
                    let x = round(x); // in 64 bits: second << 32 | first
                    let first = _mm256_srli_epi64::<16>(_mm256_slli_epi64::<32>(x));
                    _mm256_castsi256_ps(_mm256_or_si256(_mm256_srli_epi64::<32>(first), _mm256_srli_epi64::<32>(x)))
                };
                let mixed = _mm256_shuffle_ps::<0x88>(pairs(low), pairs(high));
                _mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(_mm256_castps_pd(mixed)))
            }
        }
    }

    /// As `bf16::round`.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn round(x: __m256) -> __m256i {
        let bits = _mm256_castps_si256(x);
        let even = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_set1_epi32(0xffff_0000_u32 as i32))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    pub fn transposed(x: [[u32; TURN]; TURN]) -> [[u32; TURN]; TURN] {
        // SAFETY: eight times eight elements of four bytes on both sides.
        unsafe { std::mem::transmute(transpose(std::mem::transmute::<[[u32; TURN]; TURN], [__m256; 8]>(x))) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn transpose(x: [__m256; 8]) -> [__m256; 8] {
        let mut y = x;
        for i in 0..4 {
            y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
            y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
        }
        let mut z = y;
        for i in [0, 4] {
            z[i] = _mm256_shuffle_ps::<0x44>(y[i], y[i + 2]);
            z[i + 1] = _mm256_shuffle_ps::<0xee>(y[i], y[i + 2]);
            z[i + 2] = _mm256_shuffle_ps::<0x44>(y[i + 1], y[i + 3]);
            z[i + 3] = _mm256_shuffle_ps::<0xee>(y[i + 1], y[i + 3]);
        }
        for i in 0..4 {
            y[i] = _mm256_permute2f128_ps::<0x20>(z[i], z[i + 4]);
            y[i + 4] = _mm256_permute2f128_ps::<0x31>(z[i], z[i + 4]);
        }
        y
    }
}
