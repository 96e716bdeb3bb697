/* As the reference in all but the inner choice, which is without a branch: done after the row in which both 0 and 255 are known. */
#include <stdint.h>

void extrema(const uint8_t *const *rows, int width, int height, uint8_t *low, uint8_t *high)
{
    uint8_t smallest = rows[0][0], largest = rows[0][0];
    for (int y = 0; y < height && !(smallest == 0 && largest == 255); y++) {
        const uint8_t *row = rows[y];
        for (int x = 0; x < width; x++) {
            smallest = row[x] < smallest ? row[x] : smallest;
            largest = row[x] > largest ? row[x] : largest;
        }
    }
    *low = smallest;
    *high = largest;
}
