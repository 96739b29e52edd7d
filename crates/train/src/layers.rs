//! The flat layers of the gradient monitor: embedding, then attention, norm, feed-forward, norm of every block, final norm, output projection.
//! Their norms, and one learning rate for each of them.

use crate::optimizers::Moved;
use tensor::kernels::parallel;
use tensor::kernels::simd::{self, Kernel};
use tensor::{Layout, Param};

/// Numbers summed in one go; fixed, for it decides the order of summation.
const BLOCK: usize = 4096;

/// Gradient norm at which the learning rate is left as it is.
const TARGET_NORM: f64 = 3.0;

/// Sum of squares in f64: running sums in a fixed order per block, blocks joined in order, whatever the number of threads.
pub fn sum_squares(numbers: &[f32]) -> f64 {
    sums_of_squares(&[numbers]).remove(0)
}

/// The same of each run of numbers.
pub fn sums_of_squares(runs: &[&[f32]]) -> Vec<f64> {
    let blocks: Vec<&[f32]> = runs.iter().flat_map(|run| run.chunks(BLOCK)).collect();
    let block = |block: &[f32]| simd::dispatch(SumSquares(block));
    let mut sums = parallel::map(blocks.len() > 4, blocks, block).into_iter();
    runs.iter().map(|run| sums.by_ref().take(run.len().div_ceil(BLOCK)).sum()).collect()
}

struct SumSquares<'s>(&'s [f32]);

impl Kernel for SumSquares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        squares(self.0)
    }
}

/// Σ x² in 16 running sums, enough of them to hide the latency of an addition.
#[inline(always)]
pub(crate) fn squares(numbers: &[f32]) -> f64 {
    let mut sums = [0f64; 16];
    let (lanes, rest) = numbers.as_chunks::<16>();
    for lane in lanes {
        for (sum, &x) in sums.iter_mut().zip(lane) {
            *sum += f64::from(x) * f64::from(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(x) * f64::from(x);
    }
    sums.iter().sum()
}

/// The shape a parameter has in Hugging Face files: [width] for norms, [count, rows, width] for stacked experts, else [rows, width].
pub fn shape(name: &str, param: Param) -> Vec<usize> {
    if param.count > 1 || name.contains(".experts.") {
        vec![param.count, param.rows, param.width]
    } else if param.rows == 1 && name.ends_with("norm.weight") {
        vec![param.width]
    } else {
        vec![param.rows, param.width]
    }
}

/// Which flat layer every parameter belongs to: 0 embedding (and learned positions); 1 + 4i attention of block i (and its choice of tokens), 2 + 4i its norm,
/// 3 + 4i feed-forward (dense, or router and experts, shared ones too), 4 + 4i its norm; 4L + 1 final norm; 4L + 2 output projection (empty when tied).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatLayers {
    layout: Layout,
    /// Flat layer of each parameter, in name order.
    layer: Vec<usize>,
    count: usize,
}

impl FlatLayers {
    /// Errors: one sentence naming a parameter that belongs to no layer of a model with `num_layers` blocks.
    pub fn new(layout: &Layout, num_layers: usize) -> Result<Self, String> {
        let layer = layout
            .iter()
            .map(|(name, _)| {
                flat_layer(name, num_layers)
                    .ok_or_else(|| format!("parameter {name} belongs to no layer of a model with {num_layers} blocks"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { layout: layout.clone(), layer, count: 4 * num_layers + 3 })
    }

    /// Number of flat layers: 4 L + 3.
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// (name, place, flat layer) of every parameter in name order.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, Param, usize)> {
        self.layout.iter().zip(&self.layer).map(|((name, param), &layer)| (name, param, layer))
    }

    /// ‖gradient‖ of each flat layer, padding left out. An empty layer has norm 0.
    pub fn param_norms(&self, grads: &[f32]) -> Vec<f64> {
        let matrices = self.parameters().flat_map(|(_, param, _)| (0..param.count).map(move |i| param.range(i)));
        let matrices: Vec<_> = matrices.map(|range| &grads[range]).collect();
        self.norms_of(&sums_of_squares(&matrices))
    }

    /// The norm of each flat layer from the sums of squares of all matrices, in flat order.
    pub fn norms_of(&self, squares: &[f64]) -> Vec<f64> {
        let matrices = self.parameters().flat_map(|(_, param, layer)| std::iter::repeat_n(layer, param.count));
        let mut layers = vec![0.0; self.count];
        matrices.zip(squares).for_each(|(layer, sum)| layers[layer] += sum);
        layers.into_iter().map(f64::sqrt).collect()
    }

    /// ‖Δw‖ / ‖w before‖ of each flat layer from what an optimizer step measured; 0 where nothing moved or the layer is empty.
    pub fn update_ratios(&self, moved: &[Moved]) -> Vec<f64> {
        let mut layers = vec![(0.0, 0.0); self.count];
        for (&layer, moved) in self.layer.iter().zip(moved) {
            layers[layer].0 += moved.difference;
            layers[layer].1 += moved.weight;
        }
        layers.iter().map(|&(moved, weight)| if moved == 0.0 { 0.0 } else { (moved / weight).sqrt() }).collect()
    }

    /// The learning rate of every flat layer: `rate`, times [`grad_norm_scale`] of the layer's gradient norm where `norms` is given.
    /// The norms are those of the gradient the optimizer gets, so after clipping.
    pub fn rates(&self, rate: f64, norms: Option<&[f64]>) -> Rates {
        let scales: Vec<f64> =
            (0..self.count).map(|layer| norms.map_or(1.0, |norms| grad_norm_scale(norms[layer]))).collect();
        let layers: Vec<f64> = scales.iter().map(|scale| rate * scale).collect();
        let (mut sum, mut filled) = (0.0, 0usize);
        for layer in (0..self.count).filter(|layer| self.layer.contains(layer)) {
            sum += scales[layer];
            filled += 1;
        }
        let scale_mean = if filled == 0 { 1.0 } else { sum / filled as f64 };
        Rates { parameters: self.layer.iter().map(|&layer| layers[layer]).collect(), layers, scale_mean }
    }
}

fn flat_layer(name: &str, num_layers: usize) -> Option<usize> {
    match name {
        "model.embed_tokens.weight" | "model.embed_positions.weight" => return Some(0),
        "model.norm.weight" => return Some(4 * num_layers + 1),
        "lm_head.weight" => return Some(4 * num_layers + 2),
        _ => {}
    }
    let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let block = block.parse::<usize>().ok().filter(|&block| block < num_layers)?;
    let place = match rest.split('.').next()? {
        "self_attn" | "depths" => 1,
        "input_layernorm" => 2,
        "mlp" => 3,
        "post_attention_layernorm" => 4,
        _ => return None,
    };
    Some(4 * block + place)
}

/// Gradient-norm scaling of the learning rate: (3 / (G + 1e-6))^0.5 between 0.3 and 3; 1 for a layer without gradient.
pub fn grad_norm_scale(norm: f64) -> f64 {
    if norm < 1e-6 { 1.0 } else { (TARGET_NORM / (norm + 1e-6)).sqrt().clamp(0.3, 3.0) }
}

/// Learning rates of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    /// One rate per flat layer.
    pub layers: Vec<f64>,
    /// Mean of the scales over the layers that hold parameters; 1 without scaling.
    pub scale_mean: f64,
    /// One rate per parameter, in name order.
    parameters: Vec<f64>,
}

impl Rates {
    /// One rate for every parameter of `layout`.
    pub fn uniform(layout: &Layout, rate: f64) -> Self {
        Self { layers: vec![rate], scale_mean: 1.0, parameters: vec![rate; layout.iter().count()] }
    }

    /// The rate of the parameter at `index` in name order.
    pub fn parameter(&self, index: usize) -> f64 {
        self.parameters[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(num_layers: usize, tied: bool) -> Layout {
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![5, 3], true),
            ("model.embed_positions.weight".to_owned(), vec![4, 3], true),
            ("model.norm.weight".to_owned(), vec![3], true),
        ];
        for i in 0..num_layers {
            for (name, shape) in [
                ("input_layernorm.weight", vec![3]),
                ("post_attention_layernorm.weight", vec![3]),
                ("self_attn.q_proj.weight", vec![3, 3]),
                ("self_attn.cope.weight", vec![4, 3]),
                ("self_attn.heads.shared.weight", vec![1, 3]),
                ("mlp.gate.weight", vec![2, 3]),
                ("mlp.experts.gate_up_proj", vec![2, 4, 3]),
                ("mlp.experts.down_proj", vec![2, 3, 2]),
                ("mlp.shared_experts.down_proj.weight", vec![3, 4]),
            ] {
                tensors.push((format!("model.layers.{i}.{name}"), shape, true));
            }
        }
        if !tied {
            tensors.push(("lm_head.weight".to_owned(), vec![5, 3], true));
        }
        Layout::new(tensors)
    }

    #[test]
    fn every_parameter_has_the_flat_layer_of_the_table() {
        let layout = layout(3, false);
        let layers = FlatLayers::new(&layout, 3).unwrap();
        assert_eq!(layers.len(), 15);
        let of = |name: &str| layers.parameters().find(|p| p.0 == name).unwrap().2;
        assert_eq!(of("model.embed_tokens.weight"), 0);
        assert_eq!(of("model.embed_positions.weight"), 0);
        for i in 0..3 {
            assert_eq!(of(&format!("model.layers.{i}.self_attn.q_proj.weight")), 1 + 4 * i);
            assert_eq!(of(&format!("model.layers.{i}.self_attn.cope.weight")), 1 + 4 * i);
            assert_eq!(of(&format!("model.layers.{i}.self_attn.heads.shared.weight")), 1 + 4 * i);
            assert_eq!(of(&format!("model.layers.{i}.input_layernorm.weight")), 2 + 4 * i);
            assert_eq!(of(&format!("model.layers.{i}.mlp.gate.weight")), 3 + 4 * i);
            assert_eq!(of(&format!("model.layers.{i}.mlp.experts.down_proj")), 3 + 4 * i);
            assert_eq!(of(&format!("model.layers.{i}.mlp.shared_experts.down_proj.weight")), 3 + 4 * i);
            assert_eq!(of(&format!("model.layers.{i}.post_attention_layernorm.weight")), 4 + 4 * i);
        }
        assert_eq!((of("model.norm.weight"), of("lm_head.weight")), (13, 14));
    }

    #[test]
    fn a_name_of_no_layer_is_refused_by_name() {
        let three = layout(3, false);
        assert!(FlatLayers::new(&three, 2).unwrap_err().contains("model.layers.2."));
        let odd = Layout::new([("model.layers.0.other.weight".to_owned(), vec![2], true)]);
        assert!(FlatLayers::new(&odd, 1).unwrap_err().contains("model.layers.0.other.weight"));
    }

    #[test]
    fn shapes_are_those_of_hugging_face_files() {
        let layout = layout(1, false);
        let of = |name: &str| shape(name, layout.get(name).unwrap());
        assert_eq!(of("model.norm.weight"), [3]);
        assert_eq!(of("model.layers.0.input_layernorm.weight"), [3]);
        assert_eq!(of("model.layers.0.self_attn.heads.shared.weight"), [1, 3]);
        assert_eq!(of("model.layers.0.mlp.experts.down_proj"), [2, 3, 2]);
        assert_eq!(of("model.layers.0.mlp.shared_experts.down_proj.weight"), [3, 4]);
        let one = Layout::new([("model.layers.0.mlp.experts.down_proj".to_owned(), vec![1, 3, 2], true)]);
        let (name, param) = one.iter().next().unwrap();
        assert_eq!(shape(name, param), [1, 3, 2]);
    }

    #[test]
    fn norms_leave_padding_and_other_layers_out_and_a_tied_output_is_empty() {
        let layout = layout(1, true);
        let layers = FlatLayers::new(&layout, 1).unwrap();
        let mut buffer = vec![100.0; layout.len()]; // so that padding would show
        for (_, param) in layout.iter() {
            (0..param.count).for_each(|i| buffer[param.range(i)].fill(0.0));
        }
        let experts = layout.get("model.layers.0.mlp.experts.down_proj").unwrap();
        buffer[experts.range(0)][0] = 3.0;
        buffer[experts.range(1)][5] = -4.0;
        assert_eq!(layers.param_norms(&buffer), [0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0]);
        let moved = layers.parameters().map(|(name, ..)| match name.ends_with("experts.down_proj") {
            true => Moved { difference: 1.0, weight: 16.0 },
            false => Moved { difference: 0.0, weight: if name.ends_with("gate_up_proj") { 9.0 } else { 0.0 } },
        });
        let moved: Vec<Moved> = moved.collect();
        assert_eq!(layers.update_ratios(&moved), [0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0]);
        let rates = layers.rates(1.0, Some(&layers.param_norms(&buffer)));
        assert_eq!(rates.layers[6], 1.0);
        assert!((rates.scale_mean - (5.0 + grad_norm_scale(5.0)) / 6.0).abs() < 1e-15); // six layers hold parameters
    }

    #[test]
    fn gradient_norm_scale_meets_its_vectors() {
        for (norm, scale) in [
            (3.0, 1.0),
            (0.75, 2.0),
            (12.0, 0.5),
            (27.0, 1.0 / 3.0),
            (48.0, 0.3),
            (1.0 / 3.0, 3.0),
            (0.2, 3.0),
            (1e-7, 1.0),
            (0.0, 1.0),
        ] {
            assert!((grad_norm_scale(norm) - scale).abs() < 1e-5, "{norm}");
        }
    }

    #[test]
    fn every_parameter_gets_the_rate_of_its_layer() {
        let layout = layout(1, false);
        let layers = FlatLayers::new(&layout, 1).unwrap();
        let rates = layers.rates(0.5, Some(&[12.0, 0.75, 3.0, 3.0, 3.0, 3.0, 48.0]));
        for (i, (_, _, layer)) in layers.parameters().enumerate() {
            assert_eq!(rates.parameter(i), rates.layers[layer]);
        }
        assert!((rates.layers[0] - 0.25).abs() < 1e-6 && (rates.layers[1] - 1.0).abs() < 1e-5);
        assert!(layers.rates(0.5, None).layers.iter().all(|&rate| rate == 0.5));
    }

    #[test]
    fn sums_of_squares_do_not_depend_on_threads_and_do_not_overflow() {
        let numbers: Vec<f32> = (0..100_003).map(|i| ((i * 7919) % 1013) as f32 / 97.0 - 5.0).collect();
        let sums: Vec<u64> = [1, 3, 8]
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| sum_squares(&numbers)).to_bits()
            })
            .to_vec();
        assert!(sums.iter().all(|&sum| sum == sums[0]));
        let plain: f64 = numbers.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        assert!((f64::from_bits(sums[0]) / plain - 1.0).abs() < 1e-12);
        assert!(sum_squares(&[f32::MAX; 1000]).is_finite());
    }
}
