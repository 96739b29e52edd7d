//! Products of tiles by AVX-512 in strips of sixteen rows, for elements that are numbers or pairs of bf16.

/// Defines `product` and `outer` for the elements of an instruction set; beside it stand `Vector`, sixteen elements, `load`, which makes one, and
/// `step`, which adds the products of one element with sixteen. Sixteen lanes are `$depth` elements.
macro_rules! products {
    ($features:literal, $element:ty, $depth:expr) => {
        /// `lanes::product`; element (i, k) of a lies at i·row + k·col.
        ///
        /// # Safety
        /// The machine has the set; a has its elements for the rows of dst and the depth of b.
        #[target_feature(enable = $features)]
        pub unsafe fn product(
            dst: &mut [Lanes<f32>],
            (a, row, col): (*const $element, usize, usize),
            b: &[Lanes<$element>],
            accumulate: bool,
        ) {
            let mut i = 0;
            macro_rules! strips {
                ($m:literal) => {
                    while dst.len() - i >= $m {
                        // SAFETY: the caller's, for the rows i..i + M.
                        unsafe { strip::<$m>(&mut dst[i..i + $m], (a.add(i * row), row, col), b, accumulate) };
                        i += $m;
                    }
                };
            }
            strips!(16);
            strips!(8);
            strips!(4);
            strips!(2);
            strips!(1);
        }

        /// M rows of a product.
        ///
        /// # Safety
        /// As for `product`.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn strip<const M: usize>(
            dst: &mut [Lanes<f32>],
            (a, row, col): (*const $element, usize, usize),
            b: &[Lanes<$element>],
            accumulate: bool,
        ) {
            // SAFETY: the caller's.
            unsafe {
                let mut sums = [_mm512_setzero_ps(); M];
                if accumulate {
                    sums.iter_mut().zip(&*dst).for_each(|(sum, dst)| *sum = _mm512_loadu_ps(dst.0.as_ptr()));
                }
                // Four rows to a pointer, so that the addresses of sixteen need few registers.
                let mut at: [*const $element; 4] = std::array::from_fn(|q| a.wrapping_add(4 * q * row));
                for b in b {
                    let b = load(!0, b.0.as_ptr());
                    for i in 0..M {
                        sums[i] = step(sums[i], *at[i / 4].add(i % 4 * row), b);
                    }
                    at = at.map(|at| at.wrapping_add(col));
                }
                dst.iter_mut().zip(sums).for_each(|(dst, sum)| _mm512_storeu_ps(dst.0.as_mut_ptr(), sum));
            }
        }

        /// `lanes::outer`: dst [rows, width] += a [rows, depth] · b [depth, width].
        ///
        /// # Safety
        /// The machine has the set; dst has a row for each of a, b `$depth` rows.
        #[target_feature(enable = $features)]
        pub unsafe fn outer(dst: &mut [f32], a: &[[$element; $depth]], b: &[$element], width: usize) {
            for start in (0..width).step_by(LANES) {
                let mask = if width - start < LANES { (1u16 << (width - start)) - 1 } else { u16::MAX };
                let mut i = 0;
                macro_rules! patches {
                    ($m:literal) => {
                        while a.len() - i >= $m {
                            let a: &[[$element; $depth]; $m] = a[i..i + $m].try_into().expect("rows of the patch");
                            // SAFETY: the caller's, for the rows i..i + M and the columns of the mask.
                            unsafe {
                                let to = dst.as_mut_ptr().add(i * width + start);
                                patch::<$m>(a, (to, b.as_ptr().add(start), width), mask);
                            }
                            i += $m;
                        }
                    };
                }
                patches!(16);
                patches!(8);
                patches!(4);
                patches!(2);
                patches!(1);
            }
        }

        /// # Safety
        /// As for `outer`, for the M rows of a and the columns of the mask.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn patch<const M: usize>(
            a: &[[$element; $depth]; M],
            (dst, b, width): (*mut f32, *const $element, usize),
            mask: __mmask16,
        ) {
            // SAFETY: the caller's.
            unsafe {
                let mut sums: [__m512; M] = std::array::from_fn(|i| _mm512_maskz_loadu_ps(mask, dst.add(i * width)));
                for k in 0..$depth {
                    let b = load(mask, b.add(k * width));
                    for i in 0..M {
                        sums[i] = step(sums[i], a[i][k], b);
                    }
                }
                for i in 0..M {
                    _mm512_mask_storeu_ps(dst.add(i * width), mask, sums[i]);
                }
            }
        }
    };
}

pub(super) use products;
