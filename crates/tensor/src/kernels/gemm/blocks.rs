//! How a list of products is cut into work: the right sides are packed first, then blocks of rows are taken by whatever thread is free. A number of
//! dst is summed in the same order wherever it lies in a tile, a block or a task: bytes depend neither on threads nor on the size of the product.

use super::number::Number;
use super::pack::{Element, Operand, Source};
use super::tile::{Strip, Tile, bf16_tile, f32_tile};
use crate::Precision;
use crate::isa::Isa;
use crate::kernels::memory::large_pages;
use crate::kernels::simd::{self, Kernel};
use crate::kernels::{crew, parallel};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// Elements of k that a tile sums before it adds to dst. Fixed: it decides the order of summation.
const DEPTH: usize = 256;

/// Tiles a block of rows has at most: what a task packs stays in the second cache.
const BLOCK: usize = 16;

/// Below this many columns the rows of a left side of f32 are read where they lie.
const NARROW: usize = 160;

/// Below this many multiplications a list is computed at once by the calling thread.
const SMALL: usize = 1 << 19;

/// Elements of right sides that are packed at a time: 8 MiB that a thread keeps, and that stay in the third cache.
const ROOM: usize = 1 << 21;

/// One product dst [m, n] (rows `stride` apart) = a [k, m]ᵀ · b [k, n]; `a` runs along k and m, `b` along k and n.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub dst: *mut f32,
    pub stride: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Operand<'a>,
    pub b: Operand<'a>,
}

impl Job<'_> {
    /// The columns start..start + n of it.
    fn columns(self, start: usize, n: usize) -> Self {
        Job { n, dst: self.dst.wrapping_add(start), b: self.b.columns(start), ..self }
    }
}

// SAFETY: a job stands for a mutable borrow of dst, which `run` keeps for its whole time; tasks write disjoint parts of it.
unsafe impl Send for Job<'_> {}
unsafe impl Sync for Job<'_> {}

/// How the elements of a list of products are multiplied.
#[derive(Clone, Copy)]
pub struct Method {
    pub tile: Tile,
    pub element: Element,
}

impl Method {
    /// The fastest of an instruction set that this machine has.
    pub fn of(isa: Isa, precision: Precision) -> Self {
        let (tile, narrow) = match precision {
            Precision::F32 => (f32_tile(isa), Element::Plain),
            Precision::Bf16 => (bf16_tile(isa), Element::Rounded),
        };
        Method { tile, element: if tile.pairs { Element::Pair } else { narrow } }
    }
}

/// 64 bytes, so that packed rows start on cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

thread_local! {
    /// Recycled room for packed operands.
    static LEFT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static RIGHT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// `f` with `len` elements of arbitrary content.
fn with_room<R>(
    key: &'static std::thread::LocalKey<Cell<Vec<Line>>>,
    len: usize,
    f: impl FnOnce(&mut [u32]) -> R,
) -> R {
    let mut room = key.take();
    if room.len() * 16 < len {
        drop(room); // before there is another
        room = Vec::with_capacity(len.div_ceil(16));
        large_pages(room.as_ptr(), room.capacity());
        room.resize(room.capacity(), Line([0; 16]));
    }
    // SAFETY: a line is 16 numbers without padding.
    let flat = unsafe { std::slice::from_raw_parts_mut(room.as_mut_ptr().cast::<u32>(), room.len() * 16) };
    let found = f(&mut flat[..len]);
    key.set(room);
    found
}

/// A right side b [k, n] and where its panels are.
pub struct Right<'a> {
    method: Method,
    b: Operand<'a>,
    n: usize,
    k: usize,
    /// Elements of k, up to the tile's unit.
    depth: usize,
    /// Panels, and the first that is packed: those before are read where they lie.
    panels: usize,
    packed: usize,
    /// Where its packed panels start.
    offset: usize,
}

impl<'a> Right<'a> {
    /// A right side for `rows` rows of dst, whose packed panels will start at `offset`.
    pub fn new(method: Method, b: Operand<'a>, (k, n): (usize, usize), rows: usize, offset: usize) -> Self {
        let Method { tile, element } = method;
        let depth = k.div_ceil(element.numbers()).next_multiple_of(tile.unit);
        let panels = n.div_ceil(tile.cols);
        // Plain rows are read where they lie if so few rows of dst use them that a copy does not pay.
        let direct = element == Element::Plain && b.in_place(false).is_some() && rows <= 2 * tile.rows;
        let packed = if direct { n / tile.cols } else { 0 };
        Right { method, b, n, k, depth, panels, packed, offset }
    }

    /// Elements of its packed panels.
    pub fn len(&self) -> usize {
        (self.panels - self.packed) * self.depth * self.method.tile.cols
    }

    /// Where a panel's elements of k from `start` on are, `depth` of them, and how far apart.
    fn panel(&self, panel: usize, (start, depth): (usize, usize), room: &[u32]) -> (*const f32, usize) {
        let cols = self.method.tile.cols;
        if let Some(b) = self.b.in_place(false).filter(|_| panel < self.packed) {
            return (b.data.as_ptr().wrapping_add(start * b.stride + panel * cols), b.stride);
        }
        let before = start * (self.panels - self.packed) + (panel - self.packed) * depth;
        (room[self.offset + before * cols..].as_ptr().cast(), cols)
    }

    /// All of its panels.
    pub fn all(&self) -> (usize, usize) {
        (0, self.panels)
    }

    fn is(&self, job: &Job<'_>) -> bool {
        self.b.is(job.b) && (self.k, self.n) == (job.k, job.n)
    }
}

/// A job and its right side, which jobs may share.
struct Plan<'a, 'j> {
    job: &'j Job<'a>,
    right: usize,
    panels: usize,
}

struct Task {
    job: usize,
    rows: (usize, usize),
    panels: (usize, usize),
}

/// Computes every job, or adds to dst when `accumulate`. With `pool` the threads of the current pool take part.
///
/// # Safety
/// Every dst is valid for its rows and columns and overlaps nothing else; the tile's instruction set is there.
pub unsafe fn run(method: Method, jobs: &[Job<'_>], accumulate: bool, pool: bool) {
    let Method { tile, element } = method;
    let depth = |job: &Job<'_>| job.k.div_ceil(element.numbers()).next_multiple_of(tile.unit).max(1);
    let size = |job: &Job<'_>| depth(job) * job.n.next_multiple_of(tile.cols);
    if jobs.iter().map(size).sum::<usize>() <= ROOM {
        return unsafe { wave(method, jobs, accumulate, pool) };
    }
    let (mut next, mut held) = (Vec::with_capacity(jobs.len()), 0);
    for job in jobs {
        let widest = (ROOM / depth(job) / tile.cols).max(1) * tile.cols;
        for start in (0..job.n).step_by(widest) {
            let part = job.columns(start, widest.min(job.n - start));
            if held + size(&part) > ROOM && !next.is_empty() {
                unsafe { wave(method, &next, accumulate, pool) };
                next.clear();
                held = 0;
            }
            held += size(&part);
            next.push(part);
        }
    }
    unsafe { wave(method, &next, accumulate, pool) }
}

/// The same for jobs whose right sides are packed together.
///
/// # Safety
/// As for `run`.
unsafe fn wave(method: Method, jobs: &[Job<'_>], accumulate: bool, pool: bool) {
    let threads = threads(jobs.iter(), pool);
    let (rights, plans, total) = plans(method, jobs.iter());
    let tasks = tasks(&plans, method.tile, threads);
    with_room(&RIGHT, total, |room| {
        pack(&rights, room, threads);
        let room = &*room;
        each(tasks.len(), threads, |i| unsafe { plans[tasks[i].job].compute(&tasks[i], &rights, room, accumulate) });
    });
}

/// Threads that are to compute the jobs.
fn threads<'j>(jobs: impl Iterator<Item = &'j Job<'j>>, pool: bool) -> usize {
    let work: usize = jobs.map(|job| job.m * job.n * job.k).sum();
    if pool && work >= SMALL { rayon::current_num_threads() } else { 1 }
}

fn each(count: usize, threads: usize, one: impl Fn(usize) + Sync) {
    if threads == 1 { (0..count).for_each(one) } else { crew::run(count, one) }
}

/// The jobs that have something to do, their right sides, each once, and the elements of these.
fn plans<'a, 'j>(method: Method, jobs: impl Iterator<Item = &'j Job<'a>>) -> (Vec<Right<'a>>, Vec<Plan<'a, 'j>>, usize)
where
    'a: 'j,
{
    let (mut total, mut rights, mut plans) = (0, Vec::<Right<'_>>::new(), Vec::new());
    for job in jobs.filter(|job| job.m > 0 && job.n > 0) {
        let known =
            rights.iter().rposition(|right| right.is(job) && (right.packed == 0 || job.m <= 2 * method.tile.rows));
        let right = known.unwrap_or_else(|| {
            rights.push(Right::new(method, job.b, (job.k, job.n), job.m, total));
            total += rights[rights.len() - 1].len();
            rights.len() - 1
        });
        plans.push(Plan { job, right, panels: rights[right].panels });
    }
    (rights, plans, total)
}

/// Computes every job of the first half, or adds to its dst when `accumulate`, and then adds the job of the second half: both are parts of one sum over
/// k, which threads compute side by side, each with rows of its own. Whoever is second in a part of dst adds the two.
///
/// # Safety
/// As for `run`, for the dst of both halves.
pub unsafe fn run_halves(method: Method, halves: [&[Job<'_>]; 2], accumulate: bool) {
    let sizes = |jobs: &[Job<'_>]| jobs.iter().map(|job| (job.m, job.n)).collect::<Vec<_>>();
    assert_eq!(sizes(halves[0]), sizes(halves[1]), "halves of other sums");
    let threads = threads(halves.into_iter().flatten(), true);
    let (rights, plans, total) = plans(method, halves.into_iter().flatten());
    let (first, second) = plans.split_at(plans.len() / 2);
    let tasks = tasks(first, method.tile, threads);
    let half_done: Vec<AtomicBool> = tasks.iter().map(|_| AtomicBool::new(false)).collect();
    with_room(&RIGHT, total, |room| {
        pack(&rights, room, threads);
        let room = &*room;
        each(2 * tasks.len(), threads, |i| {
            let (i, half) = (i % tasks.len(), i / tasks.len());
            let (task, plan) = (&tasks[i], &[first, second][half][tasks[i].job]);
            // SAFETY: the caller's; only one of both halves finds that the other is done.
            unsafe {
                plan.compute(task, &rights, room, accumulate && half == 0);
                if half_done[i].swap(true, Ordering::AcqRel) {
                    task.add(first[task.job].job, second[task.job].job, method.tile);
                }
            }
        });
    });
}

impl Plan<'_, '_> {
    /// # Safety
    /// As for `run`.
    unsafe fn compute(&self, task: &Task, rights: &[Right<'_>], room: &[u32], accumulate: bool) {
        let job = self.job;
        let out = Out { dst: job.dst, stride: job.stride, right: &rights[self.right], panels: task.panels };
        unsafe { compute(job.a, task.rows, &[out], room, accumulate) }
    }
}

impl Task {
    /// Adds this part of `from` to that of `to`.
    ///
    /// # Safety
    /// Both are valid there, and nobody writes to them.
    unsafe fn add(&self, to: &Job<'_>, from: &Job<'_>, tile: Tile) {
        let (start, end) = (self.panels.0 * tile.cols, to.n.min(self.panels.1 * tile.cols));
        for row in self.rows.0..self.rows.1 {
            // SAFETY: the caller's.
            let (to, from) = unsafe {
                let from = from.dst.add(row * from.stride + start).cast_const();
                let to = to.dst.add(row * to.stride + start);
                (std::slice::from_raw_parts_mut(to, end - start), std::slice::from_raw_parts(from, end - start))
            };
            crate::tape::add(to, from);
        }
    }
}

/// A product with a right side that is packed: where it goes, and which panels of it.
#[derive(Clone, Copy)]
pub struct Out<'a, 'r> {
    pub dst: *mut f32,
    pub stride: usize,
    pub right: &'r Right<'a>,
    pub panels: (usize, usize),
}

/// The products of `m` rows of `a` with right sides that `pack` put into `room`, all of one depth and method, on this thread.
///
/// # Safety
/// As for `run`, for every dst; `a` has its rows.
pub unsafe fn multiply(a: Operand<'_>, m: usize, outs: &[Out<'_, '_>], room: &[u32], accumulate: bool) {
    let Some(first) = outs.first() else { return };
    let tall = BLOCK * first.right.method.tile.rows;
    for start in (0..m).step_by(tall) {
        unsafe { compute(a, (start, m.min(start + tall)), outs, room, accumulate) };
    }
}

/// Blocks of rows, and of columns where there are too few rows, so that every thread finds work. Each block packs its rows of the left side, best many
/// of them together and once.
fn tasks(plans: &[Plan<'_, '_>], tile: Tile, threads: usize) -> Vec<Task> {
    const FEW: usize = 4; // tiles a block of rows should have: so many columns of a turned left side are whole cache lines
    let tiles = |plan: &Plan<'_, '_>| plan.job.m.div_ceil(tile.rows) * plan.panels;
    let total: usize = plans.iter().map(tiles).sum();
    let mut tasks = Vec::new();
    for (index, plan) in plans.iter().enumerate() {
        let rows = plan.job.m.div_ceil(tile.rows);
        let (tall, wide) = if threads == 1 {
            (BLOCK, plan.panels)
        } else {
            let tall = (total / (4 * threads) / plan.panels).clamp(FEW, BLOCK).min(rows);
            let needed = (tiles(plan) * 2 * threads).div_ceil(total); // its part of two tasks a thread
            let across = needed.div_ceil(rows.div_ceil(tall)).min(plan.panels);
            (rows.div_ceil(rows.div_ceil(tall)), plan.panels.div_ceil(across))
        };
        for r in (0..rows).step_by(tall) {
            for p in (0..plan.panels).step_by(wide) {
                let rows = (r * tile.rows, ((r + tall) * tile.rows).min(plan.job.m));
                tasks.push(Task { job: index, rows, panels: (p, (p + wide).min(plan.panels)) });
            }
        }
    }
    tasks
}

/// Packs the panels of right sides that lie one after the other in `room`, run of k after run of k.
pub fn pack(rights: &[Right<'_>], mut room: &mut [u32], threads: usize) {
    const PANELS: usize = 8; // that one thread packs together: long pieces of a row are read faster than many short ones
    let mut groups = Vec::new();
    let large = room.len() >= 1 << 14;
    for right in rights {
        let cols = right.method.tile.cols;
        for start in (0..right.depth).step_by(DEPTH) {
            let depth = DEPTH.min(right.depth - start);
            for panel in (right.packed..right.panels).step_by(PANELS) {
                let end = right.panels.min(panel + PANELS);
                let (head, tail) = std::mem::take(&mut room).split_at_mut((end - panel) * depth * cols);
                room = tail;
                groups.push((right, (start, depth), (panel * cols, right.n.min(end * cols)), head));
            }
        }
    }
    let one = |(right, (start, depth), j, to): (&Right<'_>, (usize, usize), (usize, usize), &mut [u32])| {
        let Method { tile: Tile { cols, .. }, element } = right.method;
        let layout = Layout::Panels { width: cols, stride: depth * cols, depth };
        let l = (start * element.numbers(), ((start + depth) * element.numbers()).min(right.k));
        lay(right.b, Place { element, l, j, to, layout });
    };
    parallel::each(threads > 1 && large, groups, one);
}

#[derive(Clone, Copy)]
enum Layout {
    /// Panels of `width` columns, `stride` apart: one element of k for all columns, then the next.
    Panels { width: usize, stride: usize, depth: usize },
    /// All elements of one column, then the next `stride` further.
    Lines { stride: usize, depth: usize },
}

/// What of an operand is packed, and where to.
struct Place<'a> {
    element: Element,
    l: (usize, usize),
    j: (usize, usize),
    to: &'a mut [u32],
    layout: Layout,
}

fn lay(from: Operand<'_>, place: Place<'_>) {
    match from {
        Operand::Wide(from) => simd::dispatch(Pack { from, place }),
        Operand::Narrow(from) => simd::dispatch(Pack { from, place }),
    }
}

struct Pack<'a, S> {
    from: Source<'a, S>,
    place: Place<'a>,
}

impl<S: Number> Pack<'_, S> {
    #[inline(always)]
    fn of(self, element: Element) {
        let Pack { from, place: Place { l, j, to, layout, .. } } = self;
        match layout {
            Layout::Lines { stride, depth } => from.lines(element, l, j, to, stride, depth),
            Layout::Panels { width: 4, stride, depth } => from.panels::<4>(element, l, j, to, (stride, depth)),
            Layout::Panels { width: 6, stride, depth } => from.panels::<6>(element, l, j, to, (stride, depth)),
            Layout::Panels { width: 8, stride, depth } => from.panels::<8>(element, l, j, to, (stride, depth)),
            Layout::Panels { width: 16, stride, depth } => from.panels::<16>(element, l, j, to, (stride, depth)),
            Layout::Panels { width: 32, stride, depth } => from.panels::<32>(element, l, j, to, (stride, depth)),
            Layout::Panels { width, .. } => unreachable!("no tile has {width} rows or columns"),
        }
    }
}

impl<S: Number> Kernel for Pack<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match self.place.element {
            Element::Plain => self.of(Element::Plain),
            Element::Rounded => self.of(Element::Rounded),
            Element::Pair => self.of(Element::Pair),
        }
    }
}

/// Some rows of products that share their left side, which is packed once for all of them.
///
/// # Safety
/// As for `multiply`; no other task has these rows and panels.
unsafe fn compute(a: Operand<'_>, rows: (usize, usize), outs: &[Out<'_, '_>], room: &[u32], accumulate: bool) {
    let Right { method: Method { tile, element }, depth: all, k, .. } = *outs[0].right;
    debug_assert!(outs.iter().all(|out| (out.right.depth, out.right.k) == (all, k)));
    let count = rows.1 - rows.0;
    let columns: usize = outs.iter().map(|out| (out.panels.1 - out.panels.0) * tile.cols).sum();
    // Where rows are read as they lie, and how far apart they are.
    let direct = match element {
        Element::Plain if columns < NARROW => a.in_place(true).map(|a| (a.data.as_ptr(), a.stride)),
        Element::Pair if tile.unit == 1 => a.pairs(k),
        _ => None,
    };
    let first_packed = if direct.is_some() { count / tile.rows * tile.rows } else { 0 }; // a ragged tile is packed all the same
    let packed_rows = count.next_multiple_of(tile.rows) - first_packed;
    // One element of k for all rows of a tile side by side, or one row's elements, a line apart from being a power of two: where the tile wants it,
    // or pairs need not be turned.
    let by_rows = tile.unit > 1 || (element == Element::Pair && a.along_k());
    let row_stride = DEPTH + 16;
    let size = tile.rows * DEPTH + 16; // with room for a vector that reaches beyond
    let left_room = if by_rows { packed_rows * row_stride } else { packed_rows / tile.rows * size };
    with_room(&LEFT, left_room, |left| unsafe {
        (tile.enter)();
        for start in (0..all.max(1)).step_by(DEPTH) {
            let depth = DEPTH.min(all - start);
            let numbers = (start * element.numbers(), ((start + depth) * element.numbers()).min(k));
            let layout = if by_rows {
                Layout::Lines { stride: row_stride, depth }
            } else {
                Layout::Panels { width: tile.rows, stride: size, depth }
            };
            let j = (rows.0 + first_packed, rows.1);
            lay(a, Place { element, l: numbers, j, to: left, layout });
            // Element (r, 0) of the left side, and from there to the next row and the next element.
            let place = |r: usize| match direct {
                Some((a, a_row)) if r < first_packed => (a.wrapping_add(start + (rows.0 + r) * a_row), a_row, 1),
                _ if by_rows => (left.as_ptr().add((r - first_packed) * row_stride).cast::<f32>(), row_stride, 1),
                _ => (left.as_ptr().add((r - first_packed) / tile.rows * size).cast::<f32>(), 1, tile.rows),
            };
            for Out { dst, stride, right, panels } in outs {
                for panel in panels.0..panels.1 {
                    let (b, b_k) = right.panel(panel, (start, depth), room);
                    let wide = tile.cols.min(right.n - panel * tile.cols);
                    for r in (0..count).step_by(tile.rows) {
                        let (a, a_row, a_k) = place(r);
                        let tall = tile.rows.min(count - r);
                        let dst = dst.add((rows.0 + r) * stride + panel * tile.cols);
                        let add = accumulate || start > 0;
                        let strip = Strip { k: depth, a, a_row, a_k, b, b_k, dst, stride: *stride, add };
                        if tall == tile.rows && wide == tile.cols {
                            (tile.run)(strip);
                        } else {
                            ragged(tile, strip, tall, wide);
                        }
                    }
                }
            }
        }
        (tile.leave)();
    });
}

/// A tile of which only `tall` rows and `wide` columns belong to dst.
///
/// # Safety
/// As for `Tile::run`, dst being writable in those rows and columns.
unsafe fn ragged(tile: Tile, strip: Strip, tall: usize, wide: usize) {
    let mut whole = [0.0f32; 32 * 32];
    let run = tile.half.filter(|_| wide <= tile.cols / 2).unwrap_or(tile.run);
    unsafe {
        run(Strip { dst: whole.as_mut_ptr(), stride: tile.cols, add: false, ..strip });
        for r in 0..tall {
            let to = std::slice::from_raw_parts_mut(strip.dst.add(r * strip.stride), wide);
            for (to, sum) in to.iter_mut().zip(&whole[r * tile.cols..]) {
                *to = if strip.add { *to + *sum } else { *sum };
            }
        }
    }
}
