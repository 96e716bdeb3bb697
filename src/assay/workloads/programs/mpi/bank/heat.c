#include <mpi.h>
#include <stdio.h>

#define CELLS 48
#define STEPS 50

int main(int argc, char *argv[])
{
    double old[CELLS + 2], new[CELLS + 2];
    int rank, size, left, right, cells, i, step;
    double sum = 0, total = 0;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    cells = CELLS / size;
    left = rank == 0 ? MPI_PROC_NULL : rank - 1;
    right = rank == size - 1 ? MPI_PROC_NULL : rank + 1;
    for (i = 0; i < cells + 2; i++)
        old[i] = 0;
    if (rank == 0)
        old[1] = 1000;
    for (step = 0; step < STEPS; step++) {
        MPI_Sendrecv(&old[1], 1, MPI_DOUBLE, left, 0, &old[cells + 1], 1, MPI_DOUBLE, right, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        MPI_Sendrecv(&old[cells], 1, MPI_DOUBLE, right, 1, &old[0], 1, MPI_DOUBLE, left, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        if (rank == 0)
            old[0] = old[1];
        if (rank == size - 1)
            old[cells + 1] = old[cells];
        for (i = 1; i <= cells; i++)
            new[i] = old[i] + 0.25 * (old[i - 1] - 2 * old[i] + old[i + 1]);
        for (i = 1; i <= cells; i++)
            old[i] = new[i];
    }
    for (i = 1; i <= cells; i++)
        sum += old[i] * (rank * cells + i);
    MPI_Reduce(&sum, &total, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0)
        printf("centre of heat %.4f\n", total / 1000);
    MPI_Finalize();
    return 0;
}
