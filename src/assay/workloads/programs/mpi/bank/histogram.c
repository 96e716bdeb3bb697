#include <mpi.h>
#include <stdio.h>

#define BINS 8
#define VALUES 800

int main(int argc, char *argv[])
{
    int rank, size;
    int local[BINS] = {0}, global[BINS];
    int i;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    for (i = rank; i < VALUES; i += size)
        local[(i * i + 3 * i) % 29 % BINS]++;
    MPI_Reduce(local, global, BINS, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0) {
        for (i = 0; i < BINS; i++)
            printf("bin %d: %d\n", i, global[i]);
    }
    MPI_Finalize();
    return 0;
}
