// How the values of a weight are stored.
#pragma once

#include <cstdint>

namespace octavo {

constexpr int64_t kQuantGroup = 32;  // values of a row that share a scale; half as many if there are two
constexpr int64_t kRotated = 64;     // values that are rotated together, where a row has one scale, at least

// Plain bf16 in 16 bits; or, in 8 or 4 bits, unsigned integers q in groups of 32 along a row: scale * q + minimum.
struct Encoding {
    int bits = 16;
    int scales = 1;        // in a group: 2 if its halves differ; 0 if there is one for the whole row, which is rotated
    bool minimum = false;  // one for each scale; if there is none, it is -zero() times the scale
    bool wide = false;     // scales and minima are float, else half precision

    constexpr bool operator==(const Encoding&) const = default;
    constexpr bool is_integer() const { return bits < 16; }
    constexpr bool per_row() const { return scales == 0; }
    constexpr int64_t column_multiple() const { return per_row() ? kRotated : kQuantGroup; }
    constexpr int parts() const { return scales == 2 ? 2 : 1; }  // of a group that are scaled apart
    constexpr int zero() const { return 1 << (bits - 1); }

    // Bytes of 16 rows: of a group's integers; of a line, a scale or a minimum of each row; of a group's lines.
    constexpr int64_t value_bytes() const { return 16 * kQuantGroup * bits / 8; }
    constexpr int64_t line_bytes() const { return wide ? 64 : 32; }
    constexpr int64_t scale_bytes() const { return is_integer() ? scales * (minimum ? 2 : 1) * line_bytes() : 0; }

    // The smallest that holds, without loss, what either holds.
    constexpr Encoding joined(Encoding other) const {
        if (!is_integer() || !other.is_integer()) return {};
        Encoding joint{bits > other.bits ? bits : other.bits, scales > other.scales ? scales : other.scales,
                       minimum || other.minimum, wide || other.wide || minimum != other.minimum};
        if (joint.scales == 2) joint.bits = 8, joint.wide = true;  // no format needs such kernels for less
        return joint;
    }
};

// What Octavo quantizes to.
constexpr Encoding kW8{8, 0, false, true}, kW4{4, 1, true};

}  // namespace octavo
