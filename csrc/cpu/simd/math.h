// Exponentials, logistic functions and tanh on Vec, accurate to the stated bounds.

// 2^f for |f| <= 1/2. Relative error of the polynomial: degree 6: 1.9e-9, so rounding decides (about 1 ulp); degree 4:
// 2.6e-6, for results that are rounded to bfloat16.
template <int kDegree>
inline Vec exp2_of_fraction(Vec f) {
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
  return p;
}

// 2^x for x <= 0 or so (x < 128); 0 below 2^-126 within one step.
template <int kDegree>
inline Vec exp2(Vec x) {
  x = max(set1(-150.0f), x);  // operand order: a NaN in x passes through
  const Vec n = round(x);
  return scale_by_power(exp2_of_fraction<kDegree>(sub(x, n)), n);
}

// e^x for x <= 88 within 2 ulp; 0 below 2^-126. ln 2 is split in two, the first part short enough for n * kLn2High to
// be exact, so that the error does not grow with |x| as that of exp2(x log2 e) does.
inline Vec exp(Vec x) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = max(set1(-104.0f), x);
  const Vec n = round(mul(x, set1(kLog2E)));
  Vec r = fmadd(n, set1(-kLn2High), x);
  r = fmadd(n, set1(-kLn2Low), r);
  return scale_by_power(exp2_of_fraction<6>(mul(r, set1(kLog2E))), n);
}

struct Logistic {
  Vec softplus, sigmoid, complement;
};

// softplus(-x) = log(1 + e^-x), sigmoid(-x) = 1 / (1 + e^x) and sigmoid(x), each within 4 ulp for any x and without
// overflow: all come from e = e^-|x|.
// log(1 + e) = 2 atanh(t), t = e / (2 + e) <= 1/3, by an odd polynomial of relative error 5e-9; one division serves t
// and 1 / (1 + e).
inline Logistic logistic(Vec x) {
  const Vec e = exp(sub(zero(), abs(x)));
  const Vec one = add(set1(1.0f), e), two = add(set1(2.0f), e);
  const Vec inverse = div(set1(1.0f), mul(one, two));
  const Vec larger_part = mul(two, inverse);
  const Vec t = mul(mul(e, one), inverse), square = mul(t, t);
  Vec p = fmadd(set1(1.401381978e-01f), square, set1(1.399908663e-01f));
  p = fmadd(p, square, set1(2.001089543e-01f));
  p = fmadd(p, square, set1(3.333320523e-01f));
  p = fmadd(p, square, set1(1.0f));
  const Vec positive_part = max(zero(), sub(zero(), x));
  const Vec smaller_part = mul(e, larger_part);
  return {fmadd(mul(set1(2.0f), t), p, positive_part), select_less(x, zero(), larger_part, smaller_part),
          select_less(x, zero(), smaller_part, larger_part)};
}

// log(1 + x) for 0 <= x <= 2^120 within 4 ulp, small x too: what 1 + x rounds away comes back as lost / (1 + x). The
// mantissa m in [0.75, 1.5) gives 2 atanh(t), t = (m - 1) / (m + 1), |t| <= 1/5, polynomial of relative error 3e-9.
inline Vec log1p(Vec x) {
  const Vec u = add(set1(1.0f), x), lost = sub(x, sub(u, set1(1.0f)));
  const Vec k = exponent(u), m = scale_by_power(u, sub(zero(), k));
  const Vec t = div(sub(m, set1(1.0f)), add(m, set1(1.0f))), square = mul(t, t);
  Vec p = fmadd(set1(1.518306607e-01f), square, set1(1.997874251e-01f));
  p = fmadd(p, square, set1(3.333347613e-01f));
  p = fmadd(p, square, set1(1.0f));
  return fmadd(k, set1(kLn2), fmadd(mul(set1(2.0f), t), p, div(lost, u)));
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
