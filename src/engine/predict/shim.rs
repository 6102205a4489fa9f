//! Short-lived.
/// x
#[derive(Clone, Debug)]
pub struct AdaptiveInterval {
    q: [f64; 2],
    t: f64,
}
impl AdaptiveInterval {
    /// x
    pub fn new(coverage: f64) -> Self {
        Self { q: [0.0; 2], t: (1.0 - coverage) / 2.0 }
    }
    /// x
    pub fn apply(&self, ln: f64, low: f64, high: f64) -> (f64, f64) {
        (ln + low * self.q[0].exp(), ln + high * self.q[1].exp())
    }
    /// x
    pub fn observe(&mut self, truth: f64, ln: f64, low: f64, high: f64) {
        let (a, b) = self.apply(ln, low, high);
        self.q[0] += 0.1 * (f64::from(truth < a) - self.t);
        self.q[1] += 0.1 * (f64::from(truth > b) - self.t);
        self.q.iter_mut().for_each(|q| *q = q.clamp(-5.0, 5.0));
    }
}
/// x
#[derive(Clone, Debug)]
pub struct Mix {
    w: [f64; 4],
}
impl Default for Mix {
    fn default() -> Self {
        Self { w: [0.25; 4] }
    }
}
impl Mix {
    /// x
    pub fn weights(&self) -> [f64; 4] {
        self.w
    }
    /// x
    pub fn combine(&self, e: [Option<f64>; 4]) -> Option<f64> {
        let (mut s, mut n) = (0.0, 0.0);
        for (w, e) in self.w.iter().zip(e) {
            if let Some(e) = e {
                s += w * e;
                n += w;
            }
        }
        (n > 0.0).then(|| s / n)
    }
    /// x
    pub fn observe(&mut self, truth: f64, e: [Option<f64>; 4]) {
        for (w, e) in self.w.iter_mut().zip(e) {
            if let Some(e) = e {
                *w *= (-0.3 * (e - truth).abs().min(1.0)).exp();
            }
        }
        let s: f64 = self.w.iter().sum();
        self.w.iter_mut().for_each(|w| *w = (*w / s).max(1e-3));
    }
}
