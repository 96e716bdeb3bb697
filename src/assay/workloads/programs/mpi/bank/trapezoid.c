#include <stdio.h>
#include <mpi.h>

double f(double x)
{
    return x * x * x + 1.0;
}

double area(double from, double to, int n)
{
    double width = (to - from) / n;
    double sum = (f(from) + f(to)) / 2;
    for (int i = 1; i < n; i++)
        sum += f(from + i * width);
    return sum * width;
}

int main(int argc, char *argv[])
{
    int my_rank, comm_size, source;
    int n = 1024;
    double a = 0.0, b = 4.0, part, total;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &my_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &comm_size);
    double step = (b - a) / comm_size;
    part = area(a + my_rank * step, a + (my_rank + 1) * step, n / comm_size);
    if (my_rank != 0) {
        MPI_Send(&part, 1, MPI_DOUBLE, 0, 0, MPI_COMM_WORLD);
    } else {
        total = part;
        for (source = 1; source < comm_size; source++) {
            MPI_Recv(&part, 1, MPI_DOUBLE, source, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
            total += part;
        }
        printf("the area is %.3f\n", total);
    }
    MPI_Finalize();
    return 0;
}
