//! Mixture-of-heads combination: every head's output times its gate (Jin 2410.11842). o [n, h·w], gates [n, h] -> [n, h·w].

use crate::kernels::parallel;
use crate::profile::Cost;
use crate::{Engine, Real, Tape, Value};

pub fn scale_heads<'a, T: Real>(tape: &mut Tape<'a, T>, o: &Value<T>, gates: &Value<T>) -> Value<T> {
    let (n, heads) = (gates.rows(), gates.width());
    let w = o.width() / heads;
    assert_eq!((o.rows(), o.width()), (n, heads * w), "scale_heads: one gate per token and head");
    let _span = tape.span("scale_heads", Cost::new::<T>(0, 2 * o.data().len()));
    if tape.engine() == Engine::Reference {
        return tape
            .reference(&[o, gates], &[], |t| {
                let scaled = t[0].reshape((n, heads, w))?.broadcast_mul(&t[1].unsqueeze(2)?)?;
                Ok(vec![scaled.reshape((n, heads * w))?])
            })
            .remove(0);
    }
    let mut y = tape.arena().take(n * heads * w);
    let (o_data, g_nh) = (o.data(), gates.data());
    parallel::rows(&mut y, w, |i, y_w| {
        for (y, o) in y_w.iter_mut().zip(&o_data[i * w..]) {
            *y = *o * g_nh[i];
        }
    });
    let y = tape.output(y, n, heads * w, o.needs_grad() || gates.needs_grad());
    if y.needs_grad() {
        let (o, gates, y) = (o.clone(), gates.clone(), y.slot());
        tape.record(move |grads| {
            let Some(dy) = grads.take(y) else { return };
            grads.add(gates.slot(), |dg_nh| {
                parallel::rows(dg_nh, 1, |i, dg| {
                    dg[0] += dy[i * w..(i + 1) * w].iter().zip(&o.data()[i * w..]).map(|(dy, o)| *dy * *o).sum();
                });
            });
            grads.add(o.slot(), |d_o| {
                parallel::rows(d_o, w, |i, d_w| {
                    for (d, dy) in d_w.iter_mut().zip(&dy[i * w..]) {
                        *d += *dy * gates.data()[i];
                    }
                });
            });
        });
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_agree_with_differences_and_with_the_reference() {
        for (n, heads, w) in [(0, 2, 3), (1, 1, 1), (4, 3, 5)] {
            let inputs = [check::Input::random(1, n, heads * w, 1.0), check::Input::random(2, n, heads, 1.0)];
            let op = |tape: &mut Tape<'_, f64>, x: &[Value<f64>]| vec![scale_heads(tape, &x[0], &x[1])];
            assert!(check::worst(Engine::Cpu, &inputs, &[], op) < 1e-8);
            if n > 0 {
                assert!(check::parity::<f64>(&inputs, &[], op) < 1e-13);
            }
        }
    }
}
