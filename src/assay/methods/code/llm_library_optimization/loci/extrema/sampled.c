/* Wrong, and fast: it looks at every fourth row only. What a gate is for. */
#include <stdint.h>

void extrema(const uint8_t *const *rows, int width, int height, uint8_t *low, uint8_t *high)
{
    uint8_t smallest = rows[0][0], largest = rows[0][0];
    for (int y = 0; y < height; y += 4) {
        const uint8_t *row = rows[y];
        for (int x = 0; x < width; x++) {
            smallest = row[x] < smallest ? row[x] : smallest;
            largest = row[x] > largest ? row[x] : largest;
        }
    }
    *low = smallest;
    *high = largest;
}
