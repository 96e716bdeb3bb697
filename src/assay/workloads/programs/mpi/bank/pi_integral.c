#include <stdio.h>
#include <math.h>
#include <mpi.h>

#define STEPS 100000

int main(int argc, char *argv[])
{
    int rank, size, i;
    double h, x, sum = 0.0, pi = 0.0;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    h = 1.0 / STEPS;
    for (i = rank; i < STEPS; i += size) {
        x = h * (i + 0.5);
        sum += 4.0 / (1.0 + x * x);
    }
    sum *= h;
    MPI_Reduce(&sum, &pi, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0)
        printf("pi is about %.6f\n", pi);
    MPI_Finalize();
    return 0;
}
