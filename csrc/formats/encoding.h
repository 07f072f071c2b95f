// How a packed weight stores its values.
#pragma once

#include <cstdint>

namespace octavo {

constexpr int64_t kQuantGroup = 32;  // values of a row in a group, which has one scale, or one for each half
constexpr int64_t kRotated = 64;     // spans with one scale are rotated in runs of at least so many values

// Either bf16 (16 bits); or unsigned integers q of 8 or 4 bits, in groups of 32 along a row:
// value = scale * q + minimum.
struct Encoding {
    int bits = 16;
    int scales = 1;        // per group: 2 if its halves have one each; 0 if a span of a row has one and is rotated
    bool minimum = false;  // whether each scale has a minimum; if not, minimum = -zero() * scale
    bool wide = false;     // whether scales and minima are float instead of half precision

    constexpr bool operator==(const Encoding&) const = default;
    constexpr bool is_integer() const { return bits < 16; }
    constexpr bool per_row() const { return scales == 0; }
    constexpr int64_t column_multiple() const { return per_row() ? kRotated : kQuantGroup; }
    constexpr int parts() const { return scales == 2 ? 2 : 1; }  // parts of a group, each with its own scale
    constexpr int zero() const { return 1 << (bits - 1); }

    // Bytes for 16 rows: of a group's integers; of a line (one scale, or one minimum, of each row); of a group's lines.
    constexpr int64_t value_bytes() const { return 16 * kQuantGroup * bits / 8; }
    constexpr int64_t line_bytes() const { return wide ? 64 : 32; }
    constexpr int64_t scale_bytes() const { return is_integer() ? scales * (minimum ? 2 : 1) * line_bytes() : 0; }

    // Return the smallest encoding that stores all values of this encoding and of `other` without loss.
    constexpr Encoding joined(Encoding other) const {
        if (!is_integer() || !other.is_integer()) return {};
        Encoding joint{bits > other.bits ? bits : other.bits, scales > other.scales ? scales : other.scales,
                       minimum || other.minimum, wide || other.wide || minimum != other.minimum};
        if (joint.scales == 2) joint.bits = 8, joint.wide = true;  // the only kernels there are for two scales
        return joint;
    }
};

// The encodings that Octavo quantizes to.
constexpr Encoding kW8{8, 0, false, true}, kW4{4, 1, true};

}  // namespace octavo
