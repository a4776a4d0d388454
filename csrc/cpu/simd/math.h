// exp2 and tanh on Vec, accurate to the stated bounds over the ranges that attention needs.

// 2^x for x <= 0 or so (x < 128); 0 below 2^-126 within one step. Relative error of the polynomial on [-1/2, 1/2]:
// degree 6: 1.9e-9, so rounding decides (about 1 ulp); degree 4: 2.6e-6, for results that are rounded to bfloat16.
template <int kDegree>
inline Vec exp2(Vec x) {
  x = max(set1(-150.0f), x);  // operand order: a NaN in x passes through
  const Vec n = round(x);
  const Vec f = sub(x, n);
  Vec p;
  if constexpr (kDegree == 6) {
    p = fmadd(set1(1.534581200e-04f), f, set1(1.339993139e-03f));
    p = fmadd(p, f, set1(9.618488959e-03f));
    p = fmadd(p, f, set1(5.550328777e-02f));
    p = fmadd(p, f, set1(2.402264689e-01f));
    p = fmadd(p, f, set1(6.931472057e-01f));
    p = fmadd(p, f, set1(1.0f));
  } else {
    static_assert(kDegree == 4, "coefficients exist for degrees 4 and 6");
    p = fmadd(set1(9.570101878e-03f), f, set1(5.591786178e-02f));
    p = fmadd(p, f, set1(2.402474484e-01f));
    p = fmadd(p, f, set1(6.931218146e-01f));
    p = fmadd(p, f, set1(9.999992614e-01f));
  }
  return scale_by_power(p, n);
}

// |x| < 0.625: x times an even polynomial (relative error 4e-9); beyond: 1 - 2 / (e^2|x| + 1) with the sign of x,
// whose subtraction loses at most one bit there. About 2 ulp.
inline Vec tanh(Vec x) {
  const Vec a = abs(x), square = mul(x, x);
  Vec p = fmadd(set1(-5.659988945e-03f), square, set1(2.059098862e-02f));
  p = fmadd(p, square, set1(-5.372106828e-02f));
  p = fmadd(p, square, set1(1.333112754e-01f));
  p = fmadd(p, square, set1(-3.333326053e-01f));
  p = fmadd(p, square, set1(1.0f));
  const Vec grown = exp2<6>(mul(min(set1(20.0f), a), set1(2.0f * kLog2E)));
  const Vec large = fmadd(set1(-2.0f), div(set1(1.0f), add(grown, set1(1.0f))), set1(1.0f));
  return select_less(a, set1(0.625f), mul(x, p), copy_sign(large, x));
}
