//! SwiGLU experts on a ragged list of assignments: y_t = Σ_a w_a W_down,e (silu(G_e x_t) * (U_e x_t)) over the assignments a = (t, e) of token t.
//! Tokens are counting-sorted by expert. A task takes a block of rows of one expert through gather, products and activation while they are in
//! its cache; nothing of size tokens x experts x width exists.

use crate::kernels::bf16::Bf16;
use crate::kernels::gemm::{Matrix, Packed, Product, Side, grouped};
use crate::kernels::parallel;
use crate::ops::hidden::Stored;
use crate::profile::Cost;
use crate::{Arena, Engine, Param, Precision, Real, Tape, Value};
use candle_core::{Device, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Which experts every token goes to: row t is `expert_ids_a[row_offsets_n1[t]..row_offsets_n1[t + 1]]`, of any length, also 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignments {
    /// Starts of the rows, and the number of assignments as the last entry.
    pub row_offsets_n1: Vec<usize>,
    /// Ids below `num_experts` are experts; any other id computes nothing.
    pub expert_ids_a: Vec<u32>,
    pub num_experts: usize,
}

impl Assignments {
    pub fn num_tokens(&self) -> usize {
        self.row_offsets_n1.len().saturating_sub(1)
    }

    /// The places of token `t` in arrays over assignments.
    pub fn span(&self, t: usize) -> Range<usize> {
        self.row_offsets_n1[t]..self.row_offsets_n1[t + 1]
    }

    /// What the experts compute for the assignments that compute: three products of a row with each expert's weights.
    fn cost<T>(&self, gate_up: Param, down: Param) -> Cost {
        let used = self.expert_ids_a.iter().filter(|id| (**id as usize) < self.num_experts).count();
        let (weights, d, g) = (gate_up.len() + down.len(), down.rows, down.width);
        let rows = 2 * self.num_tokens() * d + used * (2 * d + 3 * g);
        Cost::new::<T>(2 * used * weights, self.num_experts.min(used) * weights + rows)
    }

    /// The ids of token `t`.
    pub fn row(&self, t: usize) -> &[u32] {
        &self.expert_ids_a[self.span(t)]
    }
}

/// x [n, d], weights_a [a, 1], gate_up [e, 2g, d] (rows 0..g gate, g..2g up), down [e, d, g], y [n, d]. Gradients for x, weights_a, gate_up and
/// down; an expert without tokens gets exactly zero. Panics if shapes differ: they are fixed by the validated configuration.
pub fn experts<'a, T: Real>(
    tape: &mut Tape<'a, T>,
    x: &Value<T>,
    weights_a: &Value<T>,
    routing: &Arc<Assignments>,
    gate_up: Param,
    down: Param,
) -> Value<T> {
    assert!(x.width() == gate_up.width && x.width() == down.rows, "experts: widths differ");
    assert!(gate_up.rows == 2 * down.width, "experts: hidden sizes differ");
    assert!(gate_up.count == routing.num_experts && down.count == routing.num_experts, "experts: counts differ");
    assert_eq!(x.rows(), routing.num_tokens(), "experts: the routing is for another number of tokens");
    assert_eq!(weights_a.data().len(), routing.expert_ids_a.len(), "experts: one weight per assignment");
    let _span = tape.span("experts", routing.cost::<T>(gate_up, down));
    match tape.engine() {
        Engine::Reference => {
            let formula = |t: &[Tensor]| reference(t, routing);
            tape.reference(&[x, weights_a], &[gate_up, down], formula).remove(0)
        }
        _ if tape.precision().rounds::<T>() => cpu::<T, Bf16>(tape, x, weights_a, routing, gate_up, down),
        _ => cpu::<T, T>(tape, x, weights_a, routing, gate_up, down),
    }
}

fn reference(t: &[Tensor], routing: &Assignments) -> candle_core::Result<Vec<Tensor>> {
    let (x_nd, weights_a1) = (&t[0], &t[1]);
    // A single matrix arrives without its leading dimension.
    let stack = |t: &Tensor| if t.rank() == 2 { t.unsqueeze(0) } else { Ok(t.clone()) };
    let (gate_up, down) = (stack(&t[2])?, stack(&t[3])?);
    let g = down.dim(2)?;
    let mut y_nd = x_nd.zeros_like()?;
    for expert in 0..routing.num_experts {
        let (mut tokens, mut places) = (Vec::new(), Vec::new());
        for token in 0..routing.num_tokens() {
            for place in routing.span(token) {
                if routing.expert_ids_a[place] as usize == expert {
                    tokens.push(token as u32);
                    places.push(place as u32);
                }
            }
        }
        if tokens.is_empty() {
            continue;
        }
        let (count, device) = (tokens.len(), Device::Cpu);
        let (tokens, places) = (Tensor::from_vec(tokens, count, &device)?, Tensor::from_vec(places, count, &device)?);
        let pre = x_nd.index_select(&tokens, 0)?.matmul(&gate_up.get(expert)?.t()?)?;
        let hidden = (pre.narrow(1, 0, g)?.silu()? * pre.narrow(1, g, g)?)?;
        let output = hidden.matmul(&down.get(expert)?.t()?)?;
        y_nd = y_nd.index_add(&tokens, &output.broadcast_mul(&weights_a1.index_select(&places, 0)?)?, 0)?;
    }
    Ok(vec![y_nd])
}

const NOWHERE: u32 = u32::MAX;

/// The assignments that compute, sorted by expert; inside an expert in token order (a stable counting sort). s = their number.
struct Sorted {
    offsets_e1: Vec<usize>,
    tokens_s: Vec<u32>,
    assignments_s: Vec<u32>,
    /// Place of every assignment in the sorted order, `NOWHERE` for ids that compute nothing.
    places_a: Vec<u32>,
}

impl Sorted {
    fn new(routing: &Assignments) -> Self {
        let computes = |id: u32| (id as usize) < routing.num_experts;
        let mut offsets_e1 = vec![0; routing.num_experts + 1];
        for &id in routing.expert_ids_a.iter().filter(|&&id| computes(id)) {
            offsets_e1[id as usize + 1] += 1;
        }
        for e in 0..routing.num_experts {
            offsets_e1[e + 1] += offsets_e1[e];
        }
        let s = offsets_e1[routing.num_experts];
        let mut next_e = offsets_e1.clone();
        let (mut tokens_s, mut assignments_s) = (vec![0; s], vec![0; s]);
        let mut places_a = vec![NOWHERE; routing.expert_ids_a.len()];
        for t in 0..routing.num_tokens() {
            for a in routing.span(t) {
                let id = routing.expert_ids_a[a];
                if computes(id) {
                    let place = next_e[id as usize];
                    next_e[id as usize] += 1;
                    (tokens_s[place], assignments_s[place], places_a[a]) = (t as u32, a as u32, place as u32);
                }
            }
        }
        Sorted { offsets_e1, tokens_s, assignments_s, places_a }
    }

    fn len(&self) -> usize {
        self.tokens_s.len()
    }

    /// The segments of some experts cut into blocks of about equal length. A row's result does not depend on its block.
    fn blocks(&self, experts: &Range<usize>) -> Vec<Block> {
        let most = parallel::block(self.places(experts).len());
        let mut blocks = Vec::new();
        for expert in experts.clone() {
            let span = &self.offsets_e1[expert..expert + 2];
            let len = span[1] - span[0];
            let size = len.div_ceil(len.div_ceil(most).max(1)).next_multiple_of(parallel::LEAST / 2).max(1);
            let starts = (span[0]..span[1]).step_by(size);
            blocks.extend(starts.map(|start| Block { expert, places: start..span[1].min(start + size) }));
        }
        blocks
    }

    /// The rows of some places, `width` numbers each.
    fn matrix<'s, T: Real, S: Stored<T>>(
        &'s self,
        rows: Rows<'s, T, S>,
        places: &Range<usize>,
        width: usize,
    ) -> Matrix<'s, T> {
        match rows {
            Rows::Tokens(rows) => Matrix::gathered(rows, width, &self.tokens_s[places.clone()]),
            Rows::Sorted(rows, first) => {
                let span = (places.start - first) * width..(places.end - first) * width;
                S::matrix(&rows[span], (places.len(), width), width)
            }
        }
    }

    /// dst_t = Σ weight(a) · rows[place of a] over the assignments of token t in their order, or += when `accumulate`.
    fn combine<T: Real>(
        &self,
        dst_nd: &mut [T],
        rows_sd: &[T],
        d: usize,
        routing: &Assignments,
        weight: impl Fn(usize) -> T + Sync,
        accumulate: bool,
    ) {
        parallel::rows(dst_nd, d, |t, dst| {
            let mut fresh = !accumulate;
            for a in routing.span(t) {
                let place = self.places_a[a];
                if place == NOWHERE {
                    continue;
                }
                let (w, row) = (weight(a), &rows_sd[place as usize * d..(place as usize + 1) * d]);
                if fresh {
                    dst.iter_mut().zip(row).for_each(|(y, x)| *y = w * *x);
                } else {
                    dst.iter_mut().zip(row).for_each(|(y, x)| *y += w * *x);
                }
                fresh = false;
            }
            if fresh {
                dst.fill(T::ZERO);
            }
        });
    }

    /// Experts whose rows are taken back together, and their gradients of the weights after them, while all that is in the caches.
    fn waves(&self) -> Vec<Range<usize>> {
        let least = WAVE * rayon::current_num_threads();
        let (mut waves, mut start) = (Vec::new(), 0);
        for e in 1..self.offsets_e1.len() {
            if self.offsets_e1[e] - self.offsets_e1[start] >= least || e + 1 == self.offsets_e1.len() {
                waves.push(start..e);
                start = e;
            }
        }
        waves
    }

    /// The places of some experts.
    fn places(&self, experts: &Range<usize>) -> Range<usize> {
        self.offsets_e1[experts.start]..self.offsets_e1[experts.end]
    }

    /// The products of dW_e += (left rows of its places)ᵀ · (right rows of its places) for each of the experts that has tokens; dw are the matrices of
    /// all experts.
    fn weight_gradients<'s, T: Real, S: Stored<T>>(
        &'s self,
        products: &mut Vec<Product<'s, T>>,
        experts: &Range<usize>,
        dw: &'s mut [T],
        weight: &Param,
        (left, right): (Rows<'s, T, S>, Rows<'s, T, S>),
    ) {
        let spans = self.offsets_e1[experts.start..=experts.end].windows(2);
        let matrices = dw.chunks_mut(weight.stride).skip(experts.start);
        for (span, dw) in spans.zip(matrices).filter(|(w, _)| w[0] < w[1]) {
            let places = span[0]..span[1];
            let (left, right) = (self.matrix(left, &places, weight.rows), self.matrix(right, &places, weight.width));
            products.push(Product { dst: &mut dw[..weight.len()], a: left.t(), b: right });
        }
    }
}

/// Rows of an array: of the tokens at their places, or one for each place from one on.
#[derive(Clone, Copy)]
enum Rows<'s, T, S> {
    Tokens(&'s [T]),
    Sorted(&'s [S], usize),
}

/// Rows of a wave at least, for each thread.
const WAVE: usize = 512;

/// Some rows of one expert, as places in sorted order.
struct Block {
    expert: usize,
    places: Range<usize>,
}

/// The parts of an array of sorted rows that belong to each block.
fn split<'s, T>(blocks: &[Block], mut data: &'s mut [T], width: usize) -> Vec<&'s mut [T]> {
    let mut parts = Vec::with_capacity(blocks.len());
    for block in blocks {
        let (part, rest) = data.split_at_mut(block.places.len() * width);
        parts.push(part);
        data = rest;
    }
    parts
}

/// The matrices of a stacked weight [e, rows, cols], or their transposes, as right sides of the products of their experts' rows.
fn sides<'s, T: Real>(
    weight: &Param,
    data: &'s [T],
    sorted: &Sorted,
    transpose: bool,
    precision: Precision,
) -> impl Iterator<Item = Side<'s, T>> {
    let (rows, cols, len, stride) = (weight.rows, weight.width, weight.len(), weight.stride);
    sorted.offsets_e1.windows(2).enumerate().map(move |(e, span)| {
        let w = Matrix::new(&data[e * stride..][..len], rows, cols);
        Side { matrix: if transpose { w.t() } else { w }, precision, rows: span[1] - span[0] }
    })
}

fn cpu<'a, T: Real, S: Stored<T>>(
    tape: &mut Tape<'a, T>,
    x: &Value<T>,
    weights_a: &Value<T>,
    routing: &Arc<Assignments>,
    gate_up: Param,
    down: Param,
) -> Value<T> {
    let (n, d, g, precision) = (x.rows(), x.width(), down.width, tape.precision());
    let sorted = Sorted::new(routing);
    let s = sorted.len();
    let blocks = sorted.blocks(&(0..gate_up.count));
    let (w_gate_up, w_down, experts) = (tape.param(&gate_up), tape.param(&down), gate_up.count);
    let mut rows_sd = tape.arena().take(s * d);
    let mut pre_s2g = tape.arena().take(S::room(s * 2 * g));
    let pre = split(&blocks, S::of_mut(&mut pre_s2g, s * 2 * g), 2 * g);
    let parts = split(&blocks, &mut rows_sd, d).into_iter().zip(pre);
    let stacks = [(gate_up, w_gate_up), (down, w_down)];
    // The right sides of both stacks: gate and up of every expert, then down of every expert.
    let pack = move |arena: &Arena<T>, sorted: &Sorted, transpose: bool| {
        let all = stacks.iter().flat_map(|(param, data)| sides(param, data, sorted, transpose, precision));
        Packed::new(arena, all.collect(), parallel::pays(s * d * g))
    };
    let packed = pack(tape.arena(), &sorted, true);
    parallel::each(parallel::pays(s * d * g), blocks.iter().zip(parts).collect(), |(block, (rows, pre))| {
        let x = Matrix::gathered(x.data(), d, &sorted.tokens_s[block.places.clone()]);
        let fill = |pre: &mut [T]| packed.multiply(block.expert, pre, x, false);
        S::forward(pre, g, fill, |hidden| packed.multiply(experts + block.expert, rows, hidden, false));
    });
    drop(packed);
    let mut y_nd = tape.arena().take(n * d);
    let weights = weights_a.data();
    sorted.combine(&mut y_nd, &rows_sd, d, routing, |a| weights[a], false);
    drop(rows_sd);
    let needs_grad = x.needs_grad() || weights_a.needs_grad() || gate_up.trainable || down.trainable;
    let y = tape.output(y_nd, n, d, needs_grad);
    if y.needs_grad() {
        let (x, weights_a, routing, y) = (x.clone(), weights_a.clone(), routing.clone(), y.slot());
        tape.record(move |grads| {
            let Some(dy_nd) = grads.take(y) else { return };
            let arena = grads.arena().clone();
            let weights = weights_a.data();
            // dw_a = dy·(W_down h) = (W_downᵀ dy)·h: the expert outputs are not needed, the hidden rows are recomputed in passing.
            let waves = sorted.waves();
            let longest = waves.iter().map(|wave| sorted.places(wave).len()).max().unwrap_or(0);
            let mut hidden_wg = arena.take(S::room(longest * g));
            let (mut dx_sd, mut dweights_s) = (arena.take(s * d), arena.take(s));
            let packed = pack(&arena, &sorted, false);
            for wave in waves {
                let places = sorted.places(&wave);
                let (blocks, w, first) = (sorted.blocks(&wave), places.len(), places.start);
                let hidden_wg = S::of_mut(&mut hidden_wg, w * g);
                let pre_w2g = &mut S::of_mut(&mut pre_s2g, s * 2 * g)[first * 2 * g..places.end * 2 * g];
                let parts = split(&blocks, &mut dx_sd[first * d..places.end * d], d).into_iter();
                let parts = parts.zip(split(&blocks, pre_w2g, 2 * g)).zip(split(&blocks, hidden_wg, g));
                let parts = parts.zip(split(&blocks, &mut dweights_s[places], 1));
                let tasks = blocks.iter().zip(parts).collect();
                parallel::each(parallel::pays(w * d * g), tasks, |(block, (((dx, pre), hidden), dweights))| {
                    let dy = Matrix::gathered(&dy_nd, d, &sorted.tokens_s[block.places.clone()]);
                    let fill = |to: &mut [T]| packed.multiply(experts + block.expert, to, dy, false);
                    let weight = |i: usize| weights[sorted.assignments_s[block.places.start + i] as usize];
                    S::backward((&mut *pre, hidden), g, fill, weight, dweights);
                    if x.needs_grad() {
                        let dpre = S::matrix(pre, (block.places.len(), 2 * g), 2 * g);
                        packed.multiply(block.expert, dx, dpre, false);
                    }
                });
                let mut products = Vec::new();
                let (hidden, pre) = (Rows::Sorted(&*hidden_wg, first), Rows::Sorted(&*pre_w2g, first));
                let sides = [(&down, (Rows::Tokens(&dy_nd), hidden)), (&gate_up, (pre, Rows::Tokens(x.data())))];
                for (dw, (param, rows)) in grads.params(&[&down, &gate_up]).into_iter().zip(sides) {
                    if let Some(dw) = dw {
                        sorted.weight_gradients(&mut products, &wave, dw, param, rows);
                    }
                }
                grouped(precision, products, true);
            }
            drop(packed);
            grads.add(weights_a.slot(), |dw_a| {
                sorted.assignments_s.iter().zip(dweights_s.iter()).for_each(|(&a, dw)| dw_a[a as usize] += *dw);
            });
            grads.write(x.slot(), |dx_nd, accumulate| {
                sorted.combine(dx_nd, &dx_sd, d, &routing, |_| T::ONE, accumulate);
            });
        });
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{self, Input, generated};
    use crate::ops::swiglu::swiglu;
    use crate::{Arena, Layout};
    use proptest::prelude::*;

    fn assignments(num_experts: usize, rows: &[&[u32]]) -> Arc<Assignments> {
        let mut row_offsets_n1 = vec![0];
        for row in rows {
            row_offsets_n1.push(row_offsets_n1[row_offsets_n1.len() - 1] + row.len());
        }
        Arc::new(Assignments { row_offsets_n1, expert_ids_a: rows.concat(), num_experts })
    }

    fn setup(e: usize, d: usize, g: usize) -> (Param, Param, Vec<f64>) {
        let layout = Layout::new([("gate_up".into(), vec![e, 2 * g, d], true), ("down".into(), vec![e, d, g], true)]);
        (layout.get("gate_up").unwrap(), layout.get("down").unwrap(), check::normals(1, layout.len(), 0.7))
    }

    fn inputs(routing: &Assignments, d: usize) -> [Input; 2] {
        [Input::random(2, routing.num_tokens(), d, 1.0), Input::random(3, routing.expert_ids_a.len(), 1, 1.0)]
    }

    /// Many tokens with 0 to 3 experts each, some of them ids that compute nothing.
    fn mixed(n: usize, num_experts: usize) -> Arc<Assignments> {
        let rows: Vec<Vec<u32>> = (0..n as u32).map(|t| (0..t % 4).map(|i| (t * 7 + i * 5) % 7).collect()).collect();
        assignments(num_experts, &rows.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        let cases: [(&str, usize, Vec<&[u32]>); 7] = [
            ("empty experts, ragged rows", 4, vec![&[1], &[3, 1], &[1, 3], &[3]]),
            ("all tokens on one expert", 3, vec![&[2], &[2], &[2], &[2], &[2]]),
            ("one token for one expert", 2, vec![&[0, 1], &[1], &[1]]),
            ("tokens without an expert", 3, vec![&[], &[2], &[], &[0, 2, 1], &[]]),
            ("ids that compute nothing", 2, vec![&[3, 0], &[2], &[1, 2, 0], &[5, 4]]),
            ("one expert", 1, vec![&[0], &[0], &[]]),
            ("no token", 2, vec![]),
        ];
        for (name, num_experts, rows) in cases {
            let routing = assignments(num_experts, &rows);
            let (gate_up, down, params) = setup(num_experts, 3, 2);
            let inputs = inputs(&routing, 3);
            let worst = check::worst(Engine::Cpu, &inputs, &params, |tape, v| {
                vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]
            });
            assert!(worst < 1e-7, "{name}: {worst}");
            let wide = check::parity::<f64>(&inputs, &params, |tape, v| {
                vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]
            });
            let narrow = check::parity::<f32>(&inputs, &params, |tape, v| {
                vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]
            });
            assert!(wide < 1e-11 && narrow < 1e-4, "{name}: {wide} {narrow}");
        }
    }

    #[test]
    fn in_bf16_it_stays_within_the_rounding_of_its_operands() {
        for (n, d, g) in [(0, 4, 4), (3, 5, 7), (333, 48, 40), (900, 32, 64)] {
            let routing = mixed(n, 6);
            let (gate_up, down, params) = setup(6, d, g);
            let inputs = inputs(&routing, d);
            let found =
                check::rounding(&inputs, &params, |tape, v| vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]);
            assert!(found < 0.1, "{n} {d} {g}: {found}");
        }
    }

    #[test]
    fn large_shapes_agree_with_the_reference() {
        let routing = mixed(333, 6);
        let (gate_up, down, params) = setup(6, 48, 40);
        let inputs = inputs(&routing, 48);
        let wide = check::parity::<f64>(&inputs, &params, |tape, v| {
            vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]
        });
        let narrow = check::parity::<f32>(&inputs, &params, |tape, v| {
            vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]
        });
        assert!(wide < 1e-11 && narrow < 1e-4, "{wide} {narrow}");
    }

    /// 0 to 3 ids for every token, some of them twice; those not below the number of experts compute nothing.
    fn choices(n: usize) -> impl Strategy<Value = Vec<Vec<u32>>> {
        let id = prop_oneof![12 => 0..6u32, 1 => Just(u32::MAX)];
        prop::collection::vec(prop::collection::vec(id, 0..4), n)
    }

    /// With pre-activations of about `size`, whose products are squares of it.
    fn apart<T: Real>(rows: &[Vec<u32>], (e, d, g): (usize, usize, usize), size: f64, seed: u64) -> f64 {
        let routing = assignments(e, &rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let (gate_up, down, params) = setup(e, d, g);
        let weights = Input::random(seed + 1, routing.expert_ids_a.len(), 1, 1.0);
        let inputs = [Input::random(seed, routing.num_tokens(), d, size / (d as f64).sqrt()), weights];
        let [first, second] = [size, size * size];
        // The inputs enter twice, so that their gradient is added to as well as written.
        check::apart::<T>(&inputs, &params, &[first, second, second, second, second], |tape, v| {
            (0..2).map(|_| experts(tape, &v[0], &v[1], &routing, gate_up, down)).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn any_routing_shape_and_magnitude_agrees_with_the_reference(
            (rows, d, g) in generated::shape((700, 60)).prop_flat_map(|(n, d, g)| (choices(n), Just(d), Just(g))),
            e in 1usize..7,
            size in generated::magnitude(),
            seed in 0u64..1000,
        ) {
            let wide = apart::<f64>(&rows, (e, d, g), size, seed);
            let narrow = apart::<f32>(&rows, (e, d, g), size, seed);
            prop_assert!(wide < 1e-12 && narrow < 1e-4, "{} {}", wide, narrow);
        }
    }

    #[test]
    fn an_expert_without_tokens_gets_exactly_zero_and_the_padding_stays_zero() {
        let routing = assignments(3, &[&[0, 2], &[2], &[0]]);
        let (gate_up, down, params) = setup(3, 3, 2);
        let (_, gradients) = check::analytic::<f32>(Engine::Cpu, &inputs(&routing, 3), &params, |tape, v| {
            vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]
        });
        for p in [gate_up, down] {
            let used = |e: usize| gradients[2][p.range(e)].iter().all(|g| *g != 0.0);
            assert!(used(0) && used(2));
            assert!(gradients[2][p.range(1)].iter().all(|g| *g == 0.0));
            assert!(
                (0..3).all(|e| gradients[2][p.range(e).end..p.offset + (e + 1) * p.stride].iter().all(|g| *g == 0.0))
            );
        }
    }

    #[test]
    fn a_document_repeated_gives_the_same_outputs() {
        let routing = assignments(3, &[&[1, 2], &[0], &[], &[1, 2], &[0], &[]]);
        let (gate_up, down, params) = setup(3, 5, 4);
        let mut x = check::normals(4, 3 * 5, 1.0);
        x.extend_from_within(..);
        let w: Vec<f64> = vec![0.3, 0.5, 0.9, 0.3, 0.5, 0.9];
        let arena = Arena::default();
        let mut tape = Tape::inference(Engine::Cpu, &params, &arena);
        let (x, w) = (tape.constant(&x, 6, 5), tape.constant(&w, 6, 1));
        let y = experts(&mut tape, &x, &w, &routing, gate_up, down);
        assert_eq!(y.data()[..15], y.data()[15..]);
        assert!(y.data()[10..15].iter().all(|y| *y == 0.0), "no expert, no output");
    }

    #[test]
    fn bytes_do_not_depend_on_the_number_of_threads() {
        let routing = mixed(700, 5);
        let (gate_up, down, params) = setup(5, 64, 48);
        let inputs = inputs(&routing, 64);
        let run = |precision: Precision, threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let rows: Vec<Vec<u32>> = (0..routing.num_tokens()).map(|t| routing.row(t).to_vec()).collect();
            let (value, gradients) = pool.install(|| {
                let routing = assignments(5, &rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
                check::analytic::<f32>(Engine::Cpu, &inputs, &params, |tape, v| {
                    tape.set_precision(precision);
                    vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]
                })
            });
            (value.to_bits(), gradients.into_iter().flatten().map(f64::to_bits).collect::<Vec<_>>())
        };
        for precision in [Precision::F32, Precision::Bf16] {
            let one = run(precision, 1);
            assert!(one.1.iter().any(|bits| *bits != 0));
            assert!([2, 3, 8].into_iter().all(|threads| run(precision, threads) == one), "{precision:?}");
        }
    }

    #[test]
    fn permuting_the_tokens_permutes_the_outputs() {
        let (n, d) = (40, 6);
        let routing = mixed(n, 6);
        let (gate_up, down, params) = setup(6, d, 5);
        let x = check::normals(5, n * d, 1.0);
        let w = check::normals(6, routing.expert_ids_a.len(), 1.0);
        let order: Vec<usize> = (0..n).map(|t| (t * 17 + 3) % n).collect();
        let run = |order: &[usize]| {
            let rows: Vec<&[u32]> = order.iter().map(|&t| routing.row(t)).collect();
            let x: Vec<f64> = order.iter().flat_map(|&t| x[t * d..(t + 1) * d].to_vec()).collect();
            let w: Vec<f64> = order.iter().flat_map(|&t| w[routing.span(t)].to_vec()).collect();
            let arena = Arena::default();
            let mut tape = Tape::inference(Engine::Cpu, &params, &arena);
            let (x, w) = (tape.constant(&x, n, d), tape.constant(&w, w.len(), 1));
            experts(&mut tape, &x, &w, &assignments(6, &rows), gate_up, down).data().to_vec()
        };
        let (plain, permuted) = (run(&(0..n).collect::<Vec<_>>()), run(&order));
        for (place, &t) in order.iter().enumerate() {
            let pairs = permuted[place * d..(place + 1) * d].iter().zip(&plain[t * d..(t + 1) * d]);
            pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-12));
        }
        assert_ne!(plain, permuted);
    }

    #[test]
    fn one_expert_with_weight_one_is_the_dense_layer_bit_for_bit() {
        for (n, d, g) in [(2, 16, 16), (7, 32, 48), (96, 128, 256)] {
            let layout =
                Layout::new([("gate_up".into(), vec![1, 2 * g, d], true), ("down".into(), vec![1, d, g], true)]);
            let (gate_up, down) = (layout.get("gate_up").unwrap(), layout.get("down").unwrap());
            let gate = Param { rows: g, stride: g * d, ..gate_up };
            let up = Param { offset: gate_up.offset + g * d, ..gate };
            let params = check::normals(1, layout.len(), 0.2);
            let routing = assignments(1, &vec![&[0u32][..]; n]);
            let ones = Input { data: vec![1.0; n], rows: n, width: 1 };
            let inputs = [Input::random(2, n, d, 1.0), ones];
            let narrow: Vec<f32> = params.iter().map(|x| *x as f32).collect();
            let x: Vec<f32> = inputs[0].data.iter().map(|x| *x as f32).collect();
            let arena = Arena::default();
            let mut tape = Tape::inference(Engine::Cpu, &narrow, &arena);
            let (x, w) = (tape.constant(&x, n, d), tape.constant(&vec![1.0; n], n, 1));
            let y = experts(&mut tape, &x, &w, &routing, gate_up, down);
            let expected = swiglu(&mut tape, &x, gate, up, down);
            assert!(y.data().iter().zip(expected.data()).all(|(a, b)| a.to_bits() == b.to_bits()), "{n} {d} {g}");
            let sparse = check::analytic::<f32>(Engine::Cpu, &inputs, &params, |tape, v| {
                vec![experts(tape, &v[0], &v[1], &routing, gate_up, down)]
            });
            let dense = check::analytic::<f32>(Engine::Cpu, &inputs, &params, |tape, v| {
                vec![swiglu(tape, &v[0], gate, up, down)]
            });
            assert_eq!(sparse.1[2], dense.1[2], "{n} {d} {g}: weights");
            // One product over [gate | up] sums in another order than two; the rest of the way is the same.
            let close = sparse.1[0].iter().zip(&dense.1[0]).all(|(a, b)| (a - b).abs() < 1e-4);
            assert!(close, "{n} {d} {g}: input");
        }
    }
}
