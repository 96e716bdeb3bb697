#include <math.h>
#include <mpi.h>
#include <stdio.h>

#define N 32

int main(int argc, char *argv[])
{
    double u[N + 2], v[N + 2], change, biggest;
    int rank, size, n, i, iterations = 0;
    MPI_Status status;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    n = N / size;
    for (i = 0; i <= n + 1; i++)
        u[i] = v[i] = 0;
    if (rank == size - 1)
        u[n + 1] = v[n + 1] = 1;
    do {
        if (rank > 0)
            MPI_Send(&u[1], 1, MPI_DOUBLE, rank - 1, 0, MPI_COMM_WORLD);
        if (rank < size - 1) {
            MPI_Recv(&u[n + 1], 1, MPI_DOUBLE, rank + 1, 0, MPI_COMM_WORLD, &status);
            MPI_Send(&u[n], 1, MPI_DOUBLE, rank + 1, 1, MPI_COMM_WORLD);
        }
        if (rank > 0)
            MPI_Recv(&u[0], 1, MPI_DOUBLE, rank - 1, 1, MPI_COMM_WORLD, &status);
        change = 0;
        for (i = 1; i <= n; i++) {
            v[i] = (u[i - 1] + u[i + 1]) / 2;
            change = fmax(change, fabs(v[i] - u[i]));
        }
        for (i = 1; i <= n; i++)
            u[i] = v[i];
        MPI_Allreduce(&change, &biggest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        iterations++;
    } while (biggest > 0.001);
    if (rank == 0)
        printf("%d iterations\n", iterations);
    MPI_Finalize();
    return 0;
}
