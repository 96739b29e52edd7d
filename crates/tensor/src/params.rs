//! The flat parameter buffer: every tensor in name order, each tensor and each expert on a 64-byte boundary, the padding zero.
//! Gradients and optimizer moments use the same layout.

use std::collections::BTreeMap;

/// Boundary of a tensor or expert, in numbers (64 bytes of f32).
const ALIGN: usize = 16;

/// A region of the flat buffer: `count` matrices (experts; 1 otherwise) of [rows, width], `stride` numbers apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    pub offset: usize,
    pub count: usize,
    pub rows: usize,
    pub width: usize,
    pub stride: usize,
    /// A frozen parameter gets no gradient and costs none.
    pub trainable: bool,
}

impl Param {
    /// Numbers in one matrix.
    pub fn len(&self) -> usize {
        self.rows * self.width
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The flat range of matrix `index`.
    pub fn range(&self, index: usize) -> std::ops::Range<usize> {
        let start = self.offset + index * self.stride;
        start..start + self.len()
    }

    /// The flat range of all matrices with the padding between them.
    pub fn span(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.count * self.stride
    }
}

/// Names and places of all parameters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    entries: BTreeMap<String, Param>,
    len: usize,
}

impl Layout {
    /// Lays the tensors out in name order. `tensors`: (name, shape, trainable); a shape is [width], [rows, width] or [count, rows, width].
    pub fn new(tensors: impl IntoIterator<Item = (String, Vec<usize>, bool)>) -> Self {
        let sorted: BTreeMap<String, (Vec<usize>, bool)> =
            tensors.into_iter().map(|(name, shape, trainable)| (name, (shape, trainable))).collect();
        let mut layout = Layout::default();
        for (name, (shape, trainable)) in sorted {
            let (count, rows, width) = match shape[..] {
                [width] => (1, 1, width),
                [rows, width] => (1, rows, width),
                [count, rows, width] => (count, rows, width),
                _ => unreachable!("parameters have one to three dimensions"),
            };
            let stride = (rows * width).next_multiple_of(ALIGN);
            layout.entries.insert(name, Param { offset: layout.len, count, rows, width, stride, trainable });
            layout.len += count * stride;
        }
        layout
    }

    /// Numbers in the flat buffer, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn get(&self, name: &str) -> Option<Param> {
        self.entries.get(name).copied()
    }

    /// Parameters in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Param)> {
        self.entries.iter().map(|(name, param)| (name.as_str(), *param))
    }

    /// Numbers that are parameters, padding left out.
    pub fn count(&self) -> usize {
        self.entries.values().map(|p| p.count * p.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_and_experts_start_on_64_byte_boundaries_in_name_order() {
        let layout = Layout::new([
            ("b".into(), vec![3, 5], true),
            ("a".into(), vec![7], true),
            ("c".into(), vec![2, 3, 6], false),
        ]);
        let names: Vec<&str> = layout.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "b", "c"]);
        for (_, p) in layout.iter() {
            assert!((0..p.count).all(|i| p.range(i).start % ALIGN == 0));
        }
        let c = layout.get("c").unwrap();
        assert_eq!((c.stride, c.range(1).start - c.offset, c.trainable), (32, 32, false));
        assert_eq!((layout.len(), layout.count()), (16 + 16 + 64, 7 + 15 + 36));
    }
}
